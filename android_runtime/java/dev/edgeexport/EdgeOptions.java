package dev.edgeexport;

/** Where the runtimes are, and how they run. Each call gives changed options and leaves these as they are. */
public final class EdgeOptions {
    final int threads;
    final String onnxruntime;
    final String litert;
    final String cacheFolder;
    final boolean verified;

    public EdgeOptions() {
        this(0, "", "", "", false);
    }

    private EdgeOptions(int threads, String onnxruntime, String litert, String cacheFolder, boolean verified) {
        this.threads = threads;
        this.onnxruntime = onnxruntime;
        this.litert = litert;
        this.cacheFolder = cacheFolder;
        this.verified = verified;
    }

    /** 0, as it is at first: the runtime chooses. */
    public EdgeOptions threads(int count) {
        return new EdgeOptions(count, onnxruntime, litert, cacheFolder, verified);
    }

    /** The path of ONNX Runtime's library, where it is not in the app under its usual name. */
    public EdgeOptions onnxruntime(String library) {
        return new EdgeOptions(threads, library, litert, cacheFolder, verified);
    }

    /** The path of LiteRT's library, where it is not in the app under its usual name. */
    public EdgeOptions litert(String library) {
        return new EdgeOptions(threads, onnxruntime, library, cacheFolder, verified);
    }

    /** A folder under context.getCacheDir(), where LiteRT keeps its packed weights between runs. */
    public EdgeOptions cacheFolder(String folder) {
        return new EdgeOptions(threads, onnxruntime, litert, folder, verified);
    }

    /**
     * Files are read and compared with their hashes each time before a runtime opens them, which trusts what it opens.
     * True leaves that out: for a bundle that was verified when it was installed, in a folder that nothing but the app
     * writes to.
     */
    public EdgeOptions verified(boolean once) {
        return new EdgeOptions(threads, onnxruntime, litert, cacheFolder, once);
    }
}
