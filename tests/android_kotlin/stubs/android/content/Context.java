package android.content;

import android.os.PowerManager;
import java.io.File;

/** As much of Android's class as ThermalReadings and the README use, for a JVM. */
public class Context {
    public static final String POWER_SERVICE = "power";

    private final PowerManager power;

    public Context(PowerManager power) {
        this.power = power;
    }

    public File getCacheDir() {
        return new File(".");
    }

    public Object getSystemService(String name) {
        return name.equals(POWER_SERVICE) ? power : null;
    }
}
