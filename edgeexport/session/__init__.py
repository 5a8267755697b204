"""Host inference over a bundle: the session, the generation loop, the tokenizer and the chat template."""
