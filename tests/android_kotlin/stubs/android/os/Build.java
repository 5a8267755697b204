package android.os;

/** As much of Android's class as ThermalReadings uses, for a JVM. */
public final class Build {
    public static final class VERSION {
        public static final int SDK_INT = Integer.parseInt("35");
    }

    public static final class VERSION_CODES {
        public static final int Q = 29;
        public static final int R = 30;
    }
}
