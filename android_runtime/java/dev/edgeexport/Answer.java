package dev.edgeexport;

import java.util.concurrent.locks.LockSupport;

/** One answer, computed token by token as it is asked for. It ends with its session, and when another one begins. */
public final class Answer {
    private static final double NANOS = 1e9;

    private final long session;
    private final long ticket;
    private long due = System.nanoTime(); // when the governor lets the next token begin
    private boolean begun;
    private boolean ended;
    private FinishReason reason;

    Answer(long session, long ticket) {
        this.session = session;
        this.ticket = ticket;
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
        String[] text = new String[1];
        long started = System.nanoTime();
        int id = Native.next(session, ticket, text);
        long finished = System.nanoTime();
        due = finished + (long) (NANOS * Native.pause(session, (finished - started) / NANOS));
        if (id < 0) {
            ended = true;
            reason = FinishReason.values()[Native.finishReason(session, ticket)];
        }
        return ended && text[0].isEmpty() ? null : new Token(id, text[0]);
    }

    /** Why it ended, or null where it has not. */
    public FinishReason finishReason() {
        return reason;
    }
}
