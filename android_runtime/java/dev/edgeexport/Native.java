package dev.edgeexport;

/** The functions of jni.cpp. A handle is a number that it looks up, so that a wrong one is refused. */
final class Native {
    static {
        System.loadLibrary("edgeexport_jni");
    }

    private Native() {}

    static native long open(
            String folder, int threads, String onnxruntime, String litert, String cacheFolder, boolean verified);

    static native void close(long session);

    static native void verify(String folder);

    static native String deviceReport(
            String folder, int threads, String onnxruntime, String litert, String cacheFolder, boolean verified,
            String model, String system);

    static native void selfCheck(long session);

    static native int position(long session);

    static native int context(long session);

    static native int vocab(long session);

    static native long[] stopIds(long session);

    static native String render(long session, String[] roles, int[] partCounts, String[] parts);

    static native int[] tokenize(long session, String text, boolean addSpecialTokens);

    static native String detokenize(long session, int[] tokens, boolean skipSpecialTokens);

    static native Features encodeImage(long session, byte[] rgb, int height, int width);

    static native Features encodeAudio(long session, float[] samples, int rate);

    static native void prefill(long session, int[] tokens, Features[] shown, float[] logits);

    static native void decode(long session, int token, float[] logits);

    static native int greedy(long session);

    static native void truncate(long session, long length);

    static native long begin(
            long session, int[] prompt, Features[] shown, boolean fromStart, int maxTokens, double temperature,
            double topP, int topK, float repetitionPenalty, float frequencyPenalty, long seed);

    /** Takes in a piece of a long prompt; false where what is left is for next. */
    static native boolean feed(long session, long answer);

    /** The token's id, or -1 at the end; what became certain of the text is put into the array of one. */
    static native int next(long session, long answer, String[] text);

    static native int finishReason(long session, long answer);

    static native long openCache(int entries, long bytes, double seconds);

    static native void closeCache(long cache);

    static native void clearCache(long cache);

    static native int cacheSize(long cache);

    /** The answer that is kept for a conversation, or null. */
    static native String recall(
            long cache, long session, String[] roles, int[] partCounts, String[] parts, double seconds, long day);

    /** Keeps an answer, unless it must not be kept, or is too large. */
    static native void keep(
            long cache, long session, String[] roles, int[] partCounts, String[] parts, double seconds, long day,
            String answer);

    static native void govern(
            long session, double budget, double high, double low, double down, double up, double slowest,
            double fastest, double hold, double calm);

    static native double report(long session, double seconds, double reading);

    static native double pause(long session, double tokenSeconds);

    static native double loadOfStatus(int status);
}
