// Whether this loader makes the same text and tokens of conversations as Python did when the bundle was built.
#pragma once

#include <string_view>

#include "edgeexport/bundle.h"
#include "edgeexport/chat.h"
#include "edgeexport/tokenizer.h"

namespace edgeexport {

// Renders and tokenises the conversations of a bundle's golden/chat.json anew. Throws golden-unusable, golden-mismatch.
void checkConversations(std::string_view json, const ChatTemplate& chat, const Tokenizer& tokenizer);

// The same of a bundle; false where it has no conversations, or no tables for this loader to make them with.
// Throws tokenizer-unusable and what Bundle::read throws, too.
bool checkConversations(const Bundle& bundle);

}  // namespace edgeexport
