package dev.edgeexport;

/**
 * How the next token is chosen; greedy at first. Each call gives a changed rule and leaves this one as it is. The same
 * seed gives the same tokens as in Python.
 */
public final class Sampling {
    public static final Sampling GREEDY = new Sampling(0, 1, 0, 1, 0, 0);

    final double temperature;
    final double topP;
    final int topK;
    final float repetitionPenalty;
    final float frequencyPenalty;
    final long seed;

    private Sampling(
            double temperature, double topP, int topK, float repetitionPenalty, float frequencyPenalty, long seed) {
        this.temperature = temperature;
        this.topP = topP;
        this.topK = topK;
        this.repetitionPenalty = repetitionPenalty;
        this.frequencyPenalty = frequencyPenalty;
        this.seed = seed;
    }

    /** 0 is greedy. */
    public Sampling temperature(double value) {
        return new Sampling(value, topP, topK, repetitionPenalty, frequencyPenalty, seed);
    }

    /** Above 0, up to 1, which is no limit. */
    public Sampling topP(double value) {
        return new Sampling(temperature, value, topK, repetitionPenalty, frequencyPenalty, seed);
    }

    /** 0: all. */
    public Sampling topK(int value) {
        return new Sampling(temperature, topP, value, repetitionPenalty, frequencyPenalty, seed);
    }

    /** 1 is none. */
    public Sampling repetitionPenalty(float value) {
        return new Sampling(temperature, topP, topK, value, frequencyPenalty, seed);
    }

    /** 0 is none. */
    public Sampling frequencyPenalty(float value) {
        return new Sampling(temperature, topP, topK, repetitionPenalty, value, seed);
    }

    /** 0 and above. */
    public Sampling seed(long value) {
        return new Sampling(temperature, topP, topK, repetitionPenalty, frequencyPenalty, value);
    }
}
