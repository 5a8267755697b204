package dev.edgeexport;

import java.util.Objects;
import java.util.TimeZone;
import java.util.function.Consumer;
import java.util.function.LongSupplier;

/**
 * Answers to frequent prompts, bounded in number, bytes and age; the least recently used one goes first. One cache may
 * serve all sessions and threads of an app: an answer belongs to its bundle and chat template.
 *
 * <p>It knows a prompt again that differs in nothing but needless spaces. An answer to a prompt that speaks of a date
 * or of today is given on the same day alone, one that asks for the present moment never.
 *
 * <p>Closing it again does nothing; all else is refused with cache-closed then.
 */
public final class ResponseCache implements AutoCloseable {
    private static final double MILLIS = 1e3;
    private static final long DAY = 86_400_000; // milliseconds

    private final long handle;
    private final LongSupplier clock;

    /** 256 answers, a megabyte of prompts and answers, seven days. */
    public ResponseCache() {
        this(256, 1 << 20, 7 * 86_400.0, System::currentTimeMillis);
    }

    /** The clock gives milliseconds since 1970, as the device's does; its time zone says where a day ends. */
    public ResponseCache(int entries, long bytes, double seconds, LongSupplier clock) {
        this.clock = Objects.requireNonNull(clock, "clock");
        handle = Native.openCache(entries, bytes, seconds);
    }

    /** How many answers it has. */
    public int size() {
        return Native.cacheSize(handle);
    }

    public void clear() {
        Native.clearCache(handle);
    }

    @Override
    public void close() {
        Native.closeCache(handle);
    }

    Question ask(long session, Message... messages) {
        return new Question(session, new Messages(messages), clock.getAsLong());
    }

    /** A conversation, and when it was asked. It takes the answer to keep. */
    final class Question implements Consumer<String> {
        private final long session;
        private final Messages messages;
        private final double seconds;
        private final long day;

        private Question(long session, Messages messages, long millis) {
            this.session = session;
            this.messages = messages;
            seconds = millis / MILLIS;
            day = Math.floorDiv(millis + TimeZone.getDefault().getOffset(millis), DAY);
        }

        /** Or null. */
        String kept() {
            return Native.recall(handle, session, messages.roles, messages.counts, messages.parts, seconds, day);
        }

        @Override
        public void accept(String answer) {
            Native.keep(handle, session, messages.roles, messages.counts, messages.parts, seconds, day, answer);
        }
    }
}
