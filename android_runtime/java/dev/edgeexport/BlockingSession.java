package dev.edgeexport;

/**
 * One conversation with a bundle's model, for threads that may wait. In Kotlin, EdgeSession is the same for coroutines.
 *
 * <p>Any thread may call anything at any time. One call runs at a time: another that comes meanwhile is refused with
 * session-busy. close() lets a running call end, with session-closed, at its next token; everything after it is refused
 * with session-closed, and closing again does nothing. All failures are an EdgeException; a null where
 * none may be is a NullPointerException.
 */
public final class BlockingSession implements AutoCloseable {
    private final long handle;

    private BlockingSession(long handle) {
        this.handle = handle;
    }

    /** Opens the bundle in a folder of the app's. It takes seconds for a large model. */
    public static BlockingSession open(String folder, EdgeOptions options) {
        return new BlockingSession(
                Native.open(
                        folder, options.threads, options.onnxruntime, options.litert, options.cacheFolder,
                        options.verified));
    }

    /** Reads every file of a bundle and compares its hash: right after a download. */
    public static void verify(String folder) {
        Native.verify(folder);
    }

    /** Measures the golden vectors, and gives the JSON that `edgeexport parity BUNDLE --import` reads. */
    public static String deviceReport(String folder, EdgeOptions options, String model, String system) {
        return Native.deviceReport(
                folder, options.threads, options.onnxruntime, options.litert, options.cacheFolder, options.verified,
                model, system);
    }

    /** Replays the golden vectors of text; throws where a gate is missed. The session is reset. */
    public void selfCheck() {
        Native.selfCheck(handle);
    }

    /** Tokens in the cache. */
    public int position() {
        return Native.position(handle);
    }

    /** Tokens that the cache can hold. */
    public int context() {
        return Native.context(handle);
    }

    /** How many token ids there are. */
    public int vocab() {
        return Native.vocab(handle);
    }

    /** The ids that end an answer. */
    public long[] stopIds() {
        return Native.stopIds(handle);
    }

    /** The tokens of a conversation that the model is to answer. */
    public int[] prompt(Message... messages) {
        return tokenize(render(messages), false);
    }

    /** The text of a conversation, by the bundle's chat template. */
    public String render(Message... messages) {
        Messages all = new Messages(messages);
        return Native.render(handle, all.roles, all.counts, all.parts);
    }

    /** The token ids of a text; the tokenizer's own special tokens belong around plain text, not around a chat. */
    public int[] tokenize(String text, boolean addSpecialTokens) {
        return Native.tokenize(handle, text, addSpecialTokens);
    }

    /** The text of token ids. */
    public String detokenize(int[] tokens, boolean skipSpecialTokens) {
        return Native.detokenize(handle, tokens, skipSpecialTokens);
    }

    /** What the model sees of a picture: height * width * 3 bytes RGB, row by row from the top. */
    public Features encodeImage(byte[] rgb, int height, int width) {
        return Native.encodeImage(handle, rgb, height, width);
    }

    /** What the model hears in samples of one channel, full scale -1 to 1. */
    public Features encodeAudio(float[] samples, int rate) {
        return Native.encodeAudio(handle, samples, rate);
    }

    /** Begins an answer behind what is in the cache; a prompt shows its pictures and sounds in their order. */
    public Answer answer(int[] prompt, Sampling sampling, int maxTokens, Features... shown) {
        return new Answer(handle, begun(prompt, false, sampling, maxTokens, shown), null);
    }

    /**
     * The greedy answer to a whole conversation. Where the cache has it, it is one piece without an id, and the session
     * stays as it is. Else the session is reset and computes it, and the cache keeps what the model ended by itself.
     */
    public Answer answer(ResponseCache cache, int maxTokens, Message... messages) {
        ResponseCache.Question question = cache.ask(handle, messages);
        String kept = question.kept();
        if (kept != null) return new Answer(kept);
        int[] prompt = prompt(messages);
        reset();
        return new Answer(handle, begun(prompt, true, Sampling.GREEDY, maxTokens), question);
    }

    /** The answer that a cache has for a conversation, or null. */
    public String cached(ResponseCache cache, Message... messages) {
        return cache.ask(handle, messages).kept();
    }

    private long begun(int[] prompt, boolean fromStart, Sampling sampling, int maxTokens, Features... shown) {
        return Native.begin(handle, prompt, shown, fromStart, maxTokens, sampling.temperature, sampling.topP,
                sampling.topK, sampling.repetitionPenalty, sampling.frequencyPenalty, sampling.seed);
    }

    /** Appends tokens; writes the vocab() logits of the last one to an array, unless it is null. */
    public void prefill(int[] tokens, float[] logits, Features... shown) {
        Native.prefill(handle, tokens, shown, logits);
    }

    /** Appends one token of an answer. */
    public void decode(int token, float[] logits) {
        Native.decode(handle, token, logits);
    }

    /** The id of the largest logit of the last call. */
    public int greedy() {
        return Native.greedy(handle);
    }

    /** Forgets all tokens but the first ones. */
    public void truncate(int length) {
        Native.truncate(handle, length);
    }

    public void reset() {
        truncate(0);
    }

    /** From now on, answers slow down as readings ask for it. */
    public void govern(GovernorPolicy policy) {
        Native.govern(handle, policy.budget, policy.high, policy.low, policy.down, policy.up, policy.slowest,
                policy.fastest, policy.hold, policy.calm);
    }

    /** A reading, taken at these seconds of a clock that never goes back; gives the decode rate from now on. */
    public double report(double seconds, double reading) {
        return Native.report(handle, seconds, reading);
    }

    /** A reading, against a budget of 1, for PowerManager's THERMAL_STATUS_NONE (0) to THERMAL_STATUS_SHUTDOWN (6). */
    public static double loadOfStatus(int status) {
        return Native.loadOfStatus(status);
    }

    /** Waits for the end of a running call, which is soon, and releases the model. */
    @Override
    public void close() {
        Native.close(handle);
    }
}
