#if canImport(CoreML)
import CoreML
import EdgeExportBundle
import Foundation

/// One decoder: the functions `decode` and `prefill` of each of its packages, over one state for each package.
final class PackageDecoder {
    let context: Int
    let vocab: Int
    private var parts: [Part] = []
    private let size: Int

    private struct Part {
        let decode: MLModel
        let prefill: MLModel?
        var state: MLState
    }

    /// Compiles the packages once (minutes for large models) and keeps the results in the caches folder, named by their
    /// digests. Throws `artifact-does-not-open` with Core ML's own words.
    init(_ bundle: ModelBundle, units: MLComputeUnits) async throws {
        let component = try bundle.component("decoder")
        let specs = component.signatures.flatMap(\.inputs)
        let outputs = component.signatures.flatMap(\.outputs)
        guard let cache = component.kv, specs.contains(where: { $0.name == "input_ids" }),
            let logits = outputs.first(where: { $0.name == "logits" })?.sizes
        else {
            throw Failure(
                .bundleNoComponent, "the bundle has no decoder of token ids for Core ML",
                fix: "Build a text model for an ios-coreml target."
            )
        }
        context = cache.context
        vocab = logits[logits.count - 1]
        size = specs.filter { $0.name == "input_ids" }.compactMap { $0.sizes?.last }.max() ?? 1
        do {
            for package in try bundle.packages(of: component) {
                let compiled = try await PackageDecoder.compiled(bundle, package)
                let decode = try await PackageDecoder.load(compiled, "decode", units)
                let prefill = size > 1 ? try await PackageDecoder.load(compiled, "prefill", units) : nil
                parts.append(Part(decode: decode, prefill: prefill, state: decode.makeState()))
            }
        } catch let problem as Failure {
            throw problem
        } catch {
            throw Failure(
                .artifactDoesNotOpen, "Core ML cannot open the decoder: \(error.localizedDescription)",
                fix: "iOS 18 or macOS 15 is needed, and room for the model; else report this with the manifest."
            )
        }
    }

    /// Forget everything.
    func reset() {
        for place in parts.indices {
            parts[place].state = parts[place].decode.makeState()
        }
    }

    /// Write the tokens at `position` and the slots after it; the logits of the last one.
    func step(_ tokens: [Int], at position: Int) throws -> [Float] {
        var logits: [Float] = []
        for piece in pieces(of: tokens.count, at: position, size: size, context: context) {
            let part = Array(tokens[piece.start..<piece.start + piece.count])
            logits = try call(part, at: position + piece.start, several: piece.several)
        }
        guard logits.count == vocab, logits.allSatisfy(\.isFinite) else {
            throw Failure(
                .nonfiniteLogits, "the decoder gave a number that is not finite at position \(position)",
                fix: "Run selfCheck() and report its result with the bundle's manifest."
            )
        }
        return logits
    }

    /// One call of each package in turn; what one gives, the next may take.
    private func call(_ tokens: [Int], at position: Int, several: Bool) throws -> [Float] {
        let width = several ? size : 1
        let padded = tokens.map(Int32.init) + [Int32](repeating: 0, count: width - tokens.count)
        var values: [String: MLFeatureValue] = [
            "input_ids": MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: padded, shape: [1, width])),
            "position": MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: [Int32(position)], shape: [1])),
            "last": MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: [Int32(tokens.count - 1)], shape: [1])),
        ]
        for part in parts {
            let model = several ? part.prefill ?? part.decode : part.decode
            let taken = values.filter { model.modelDescription.inputDescriptionsByName[$0.key] != nil }
            let output = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: taken), using: part.state)
            for name in output.featureNames {
                values[name] = output.featureValue(for: name)
            }
        }
        return values["logits"]?.shapedArrayValue(of: Float.self)?.scalars ?? []
    }

    private static func load(_ compiled: URL, _ function: String, _ units: MLComputeUnits) async throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.functionName = function
        configuration.computeUnits = units
        return try await MLModel.load(contentsOf: compiled, configuration: configuration)
    }

    private static func compiled(_ bundle: ModelBundle, _ package: String) async throws -> URL {
        let files = FileManager.default
        let caches = try files.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let folder = caches.appendingPathComponent("EdgeExport", isDirectory: true)
        let name = "\(bundle.digest(ofPackage: package)).mlmodelc"
        let place = folder.appendingPathComponent(name, isDirectory: true)
        if files.fileExists(atPath: place.path) { return place }
        try files.createDirectory(at: folder, withIntermediateDirectories: true)
        let made = try await MLModel.compileModel(at: bundle.folder.appendingPathComponent(package))
        do {
            try files.moveItem(at: made, to: place)
        } catch {
            // another session of this app has compiled the same package meanwhile
            guard files.fileExists(atPath: place.path) else { throw error }
            try? files.removeItem(at: made)
        }
        return place
    }
}
#endif
