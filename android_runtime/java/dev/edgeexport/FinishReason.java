package dev.edgeexport;

/** Why an answer ended. The order is that of answer.h. */
public enum FinishReason {
    /** The model chose to. */
    STOP,
    /** It has as many tokens as were asked for. */
    LENGTH,
    /** The cache is full. */
    CONTEXT
}
