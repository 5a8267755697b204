package dev.edgeexport;

/** One token of an answer, and the text that became certain with it: often its own, sometimes none. */
public final class Token {
    /** Of text that no token belongs to: U+FFFD where an answer ends within a character, an answer out of a cache. */
    public static final int NO_ID = -1;

    private final int id;
    private final String text;

    Token(int id, String text) {
        this.id = id;
        this.text = text;
    }

    public int getId() {
        return id;
    }

    /** No piece ends within a character. Empty where the bundle has no tokenizer that this loader can read. */
    public String getText() {
        return text;
    }
}
