package dev.edgeexport;

import java.util.concurrent.locks.LockSupport;
import java.util.function.Consumer;

/** One answer, computed token by token as it is asked for. It ends with its session, and when another one begins. */
public final class Answer {
    private static final double NANOS = 1e9;

    private final long session;
    private final long ticket;
    private final Consumer<String> keeper; // of a text that the model ended by itself, or null
    private final StringBuilder whole = new StringBuilder(); // for the keeper
    private String known; // all of an answer that need not be computed, until it is given
    private long due = System.nanoTime(); // when the governor lets the next token begin
    private boolean begun;
    private boolean ended;
    private FinishReason reason;

    Answer(long session, long ticket, Consumer<String> keeper) {
        this.session = session;
        this.ticket = ticket;
        this.keeper = keeper;
    }

    Answer(String known) {
        this(0, 0, null);
        this.known = known;
        begun = true;
    }

    /** The next token, or null at the end. The first one takes the whole prompt. */
    public Token next() {
        for (long left = pauseNanos(); left > 0 && !Thread.currentThread().isInterrupted(); left = pauseNanos()) {
            LockSupport.parkNanos(left);
        }
        while (feed()) { /* one piece after the other */ }
        return compute();
    }

    /** Takes in a piece of a long prompt; false where there is nothing left to take in before a token. */
    boolean feed() {
        begun = begun || !Native.feed(session, ticket);
        return !begun;
    }

    /** How long the governor wants to wait before the next token. */
    long pauseNanos() {
        return due - System.nanoTime();
    }

    /** The next token, without waiting for the governor. */
    Token compute() {
        if (ended) return null;
        if (known != null) return end(FinishReason.STOP, known);
        String[] text = new String[1];
        long started = System.nanoTime();
        int id = Native.next(session, ticket, text);
        long finished = System.nanoTime();
        due = finished + (long) (NANOS * Native.pause(session, (finished - started) / NANOS));
        if (keeper != null) whole.append(text[0]);
        if (id >= 0) return new Token(id, text[0]);
        Token last = end(FinishReason.values()[Native.finishReason(session, ticket)], text[0]);
        if (keeper != null && reason == FinishReason.STOP) keeper.accept(whole.toString());
        return last;
    }

    private Token end(FinishReason why, String text) {
        ended = true;
        reason = why;
        return text.isEmpty() ? null : new Token(Token.NO_ID, text);
    }

    /** Why it ended, or null where it has not. */
    public FinishReason finishReason() {
        return reason;
    }
}
