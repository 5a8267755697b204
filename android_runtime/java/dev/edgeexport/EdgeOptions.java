package dev.edgeexport;

/** Where the runtimes are, and how they run. Each call gives changed options and leaves these as they are. */
public final class EdgeOptions {
    final int threads;
    final String onnxruntime;
    final String litert;
    final String cacheFolder;

    public EdgeOptions() {
        this(0, "", "", "");
    }

    private EdgeOptions(int threads, String onnxruntime, String litert, String cacheFolder) {
        this.threads = threads;
        this.onnxruntime = onnxruntime;
        this.litert = litert;
        this.cacheFolder = cacheFolder;
    }

    /** 0, as it is at first: the runtime chooses. */
    public EdgeOptions threads(int count) {
        return new EdgeOptions(count, onnxruntime, litert, cacheFolder);
    }

    /** The path of ONNX Runtime's library, where it is not in the app under its usual name. */
    public EdgeOptions onnxruntime(String library) {
        return new EdgeOptions(threads, library, litert, cacheFolder);
    }

    /** The path of LiteRT's library, where it is not in the app under its usual name. */
    public EdgeOptions litert(String library) {
        return new EdgeOptions(threads, onnxruntime, library, cacheFolder);
    }

    /** A folder under context.getCacheDir(), where LiteRT keeps its packed weights between runs. */
    public EdgeOptions cacheFolder(String folder) {
        return new EdgeOptions(threads, onnxruntime, litert, folder);
    }
}
