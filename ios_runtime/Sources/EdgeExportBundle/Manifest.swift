import Foundation

/// manifest.json of schema "edgeexport.bundle/1", as far as a loader needs it.
public struct Manifest: Decodable, Sendable {
    public static let schema = "edgeexport.bundle/1"
    public static let fileName = "manifest.json"
    static let maxBytes = 1 << 24

    public let target: Target
    public let components: [Component]
    public let files: [String: FileEntry]
    public let golden: Golden
    public let text: TextContract?

    /// What the bundle was built for. `layout` is "channels" where the package is laid out for the Neural Engine.
    public struct Target: Decodable, Sendable {
        public let name: String
        public let options: Options

        public struct Options: Decodable, Sendable {
            public let layout: String?
        }
    }

    public struct FileEntry: Decodable, Sendable {
        public let size: Int
        public let sha256: String
    }

    public struct Component: Decodable, Sendable {
        public let name: String
        public let backend: String
        public let files: [String]
        public let signatures: [Signature]
        public let kv: Cache?
    }

    /// A function of a package: `file` lies inside the package that has it.
    public struct Signature: Decodable, Sendable {
        public let name: String
        public let inputs: [Tensor]
        public let outputs: [Tensor]
        public let file: String
    }

    public struct Tensor: Decodable, Sendable {
        public let name: String
        public let dtype: String
        public let shape: [Size]

        /// The sizes, where all of them are fixed.
        public var sizes: [Int]? {
            let fixed = shape.compactMap { size -> Int? in
                if case .fixed(let count) = size { return count }
                return nil
            }
            return fixed.count == shape.count ? fixed : nil
        }
    }

    public enum Size: Decodable, Equatable, Sendable {
        case fixed(Int)
        case symbolic(String, min: Int, max: Int)

        private enum Key: String, CodingKey { case name, min, max }

        public init(from decoder: Decoder) throws {
            if let count = try? decoder.singleValueContainer().decode(Int.self) {
                self = .fixed(count)
                return
            }
            let fields = try decoder.container(keyedBy: Key.self)
            self = .symbolic(
                try fields.decode(String.self, forKey: .name),
                min: try fields.decode(Int.self, forKey: .min),
                max: try fields.decode(Int.self, forKey: .max)
            )
        }
    }

    public struct Cache: Decodable, Sendable {
        public let layers: Int
        public let context: Int
        public let dtype: String
    }

    public struct TextContract: Decodable, Sendable {
        public let stopIds: [Int]

        private enum CodingKeys: String, CodingKey { case stopIds = "stop_ids" }
    }

    public struct Golden: Decodable, Sendable {
        public let file: String?
        public let gates: Gates
    }

    /// Largest difference of logits from the artifact's where it was built; largest mean KL from the reference.
    public struct Gates: Decodable, Sendable {
        public let maxAbs: Double?
        public let kl: Double?

        private enum CodingKeys: String, CodingKey { case kl, maxAbs = "max_abs" }
    }

    private struct Version: Decodable, Sendable {
        let schema: String
    }

    /// Throws `bundle-too-new` for another schema, `bundle-bad-manifest` for what cannot be read.
    public static func read(_ data: Data) throws -> Manifest {
        let decoder = JSONDecoder()
        guard data.count <= maxBytes, let version = try? decoder.decode(Version.self, from: data) else {
            throw Failure(.bundleBadManifest, "the manifest cannot be read", fix: "Copy the bundle again.")
        }
        guard version.schema == schema else {
            throw Failure(
                .bundleTooNew, "the bundle has the schema \(version.schema), this loader reads \(schema)",
                fix: "Update EdgeExportRuntime, or build the bundle again."
            )
        }
        let manifest: Manifest
        do {
            manifest = try decoder.decode(Manifest.self, from: data)
        } catch {
            throw Failure(.bundleBadManifest, "the manifest cannot be read: \(error)", fix: "Copy the bundle again.")
        }
        for path in manifest.files.keys where !isSafe(path) {
            throw Failure(.bundleUnsafePath, "the path \(path) leaves the bundle", fix: "Do not use this bundle.")
        }
        return manifest
    }

    /// Whether a path is relative and stays inside its folder.
    static func isSafe(_ path: String) -> Bool {
        let parts = path.split(separator: "/", omittingEmptySubsequences: false)
        let outside = path.contains("\\") || path.contains(":")
        return !outside && parts.allSatisfy { part in !part.isEmpty && part != "." && part != ".." }
    }
}
