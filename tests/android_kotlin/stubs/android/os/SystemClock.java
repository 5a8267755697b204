package android.os;

/** As much of Android's class as ThermalReadings uses, for a JVM: a test sets it. */
public final class SystemClock {
    public static volatile long nanos = 0;

    public static long elapsedRealtimeNanos() {
        return nanos;
    }
}
