import Foundation

/// A bundle folder whose files have been found to be those that its manifest lists.
public struct ModelBundle: Sendable {
    public let folder: URL
    public let manifest: Manifest
    /// SHA-256 of manifest.json, by which a report says which bundle it is about.
    public let digest: String

    /// Checks every file's size, and with `hashes` (a second for each gigabyte or so) every file's SHA-256.
    public init(at folder: URL, hashes: Bool = true) throws {
        let place = folder.appendingPathComponent(Manifest.fileName)
        guard let data = try? Data(contentsOf: place) else {
            throw Failure(.bundleNotFound, "there is no bundle at \(folder.path)", fix: "Give the folder of a bundle.")
        }
        self.folder = folder
        manifest = try Manifest.read(data)
        var hash = SHA256Stream()
        hash.update(Array(data))
        digest = hash.finish()
        for (path, entry) in manifest.files.sorted(by: { $0.key < $1.key }) {
            try ModelBundle.check(folder.appendingPathComponent(path), path, entry, hashes: hashes)
        }
    }

    /// Whether the package is laid out for the Neural Engine, rather than for the GPU.
    public var suitsNeuralEngine: Bool { manifest.target.options.layout == "channels" }

    public var stopIds: Set<Int> { Set(manifest.text?.stopIds ?? []) }

    public func component(_ name: String) throws -> Manifest.Component {
        guard let found = manifest.components.first(where: { $0.name == name }) else {
            throw Failure(
                .bundleNoComponent, "the bundle has no component \(name)", fix: "Build it for a model that has one."
            )
        }
        return found
    }

    /// The ML packages of a component in the order in which they run: a large model is cut into several.
    public func packages(of component: Manifest.Component) throws -> [String] {
        var found: [String] = []
        for signature in component.signatures {
            guard let first = signature.file.split(separator: "/").first, first.hasSuffix(".mlpackage") else {
                throw Failure(
                    .bundleNoComponent, "the component \(component.name) is not an ML package",
                    fix: "Build the bundle for an ios-coreml target."
                )
            }
            if !found.contains(String(first)) { found.append(String(first)) }
        }
        return found
    }

    /// What names the compiled form of a package: it changes when any of the package's files does.
    public func digest(ofPackage package: String) -> String {
        var hash = SHA256Stream()
        for (path, entry) in manifest.files.sorted(by: { $0.key < $1.key }) where path.hasPrefix(package + "/") {
            hash.update(Array(entry.sha256.utf8))
        }
        return hash.finish()
    }

    private static func check(_ file: URL, _ path: String, _ entry: Manifest.FileEntry, hashes: Bool) throws {
        let again = "Copy the bundle again."
        guard let handle = try? FileHandle(forReadingFrom: file) else {
            throw Failure(.bundleFileMissing, "\(path) is missing", fix: again)
        }
        defer { try? handle.close() }
        let size = (try? handle.seekToEnd()).map(Int.init) ?? -1
        guard size == entry.size else {
            throw Failure(.bundleFileChanged, "\(path) has \(size) bytes, not \(entry.size)", fix: again)
        }
        guard hashes else { return }
        try handle.seek(toOffset: 0)
        var hash = SHA256Stream()
        while let data = try handle.read(upToCount: 1 << 20), !data.isEmpty {
            hash.update(Array(data))
        }
        guard hash.finish() == entry.sha256 else {
            throw Failure(.bundleFileChanged, "\(path) is not the file that was built", fix: again)
        }
    }
}
