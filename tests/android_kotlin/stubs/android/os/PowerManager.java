package android.os;

/** As much of Android's class as ThermalReadings uses, for a JVM: it reads what a test sets. */
public class PowerManager {
    public static final int THERMAL_STATUS_SEVERE = 3;

    public volatile int status = 0;
    public volatile float headroom = Float.NaN;
    public volatile int asked = 0;

    public int getCurrentThermalStatus() {
        ++asked;
        return status;
    }

    public float getThermalHeadroom(int forecastSeconds) {
        return headroom;
    }
}
