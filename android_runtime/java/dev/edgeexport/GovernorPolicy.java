package dev.edgeexport;

/**
 * When answers slow down: see governor.h. The budget and the readings are of one unit: watts, degrees above the ambient
 * temperature, or Android's thermal headroom, whose budget is 1. Each call gives a changed policy.
 */
public final class GovernorPolicy {
    final double budget;
    final double high;
    final double low;
    final double down;
    final double up;
    final double slowest;
    final double fastest;
    final double hold;
    final double calm;

    /** x0.8 above 90% of the budget, x1.1 after ten calm seconds below 70%; never below a tenth of the full rate. */
    public GovernorPolicy(double budget) {
        this(budget, 0.9, 0.7, 0.8, 1.1, 0.1, 1.0, 5.0, 10.0);
    }

    private GovernorPolicy(
            double budget, double high, double low, double down, double up, double slowest, double fastest,
            double hold, double calm) {
        this.budget = budget;
        this.high = high;
        this.low = low;
        this.down = down;
        this.up = up;
        this.slowest = slowest;
        this.fastest = fastest;
        this.hold = hold;
        this.calm = calm;
    }

    /** The parts of the budget above which the rate is lowered, and below which it is restored. */
    public GovernorPolicy band(double low, double high) {
        return new GovernorPolicy(budget, high, low, down, up, slowest, fastest, hold, calm);
    }

    /** The factors of a step down and of a step up. */
    public GovernorPolicy steps(double down, double up) {
        return new GovernorPolicy(budget, high, low, down, up, slowest, fastest, hold, calm);
    }

    /** The bounds of the rate; 1 is as fast as the device can. */
    public GovernorPolicy rates(double slowest, double fastest) {
        return new GovernorPolicy(budget, high, low, down, up, slowest, fastest, hold, calm);
    }

    /** Seconds between steps down, and calm seconds before a step up. */
    public GovernorPolicy patience(double hold, double calm) {
        return new GovernorPolicy(budget, high, low, down, up, slowest, fastest, hold, calm);
    }
}
