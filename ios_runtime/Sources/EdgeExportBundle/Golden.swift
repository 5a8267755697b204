import Foundation

/// golden/text.safetensors: a prompt, what follows it, and the logits of the original model and of the artifact.
public struct GoldenVectors {
    public let prompt: [Int]
    public let answer: [Int]
    /// One row after the prompt and after each token that follows.
    public let reference: [[Float]]
    /// What the artifact gave where it was built.
    public let artifact: [[Float]]?

    static let maxBytes = 1 << 30

    private struct Entry: Decodable {
        let dtype: String
        let shape: [Int]
        let dataOffsets: [Int]

        private enum CodingKeys: String, CodingKey { case dtype, shape, dataOffsets = "data_offsets" }
    }

    /// Throws `golden-unusable`. Every offset is compared with the file's size before it is used.
    public init(_ data: Data) throws {
        guard data.count >= 8, data.count <= GoldenVectors.maxBytes else { throw GoldenVectors.unusable("its size") }
        let length = data.prefix(8).reversed().reduce(UInt64(0)) { value, byte in value << 8 | UInt64(byte) }
        guard length <= UInt64(data.count - 8) else { throw GoldenVectors.unusable("its header") }
        let body = data.index(data.startIndex, offsetBy: 8 + Int(length))
        guard let entries = try? JSONDecoder().decode([String: Entry].self, from: data[8..<body]) else {
            throw GoldenVectors.unusable("its header")
        }
        func bytes(_ name: String, _ dtype: String, _ size: Int) throws -> (Data, [Int])? {
            guard let entry = entries[name] else { return nil }
            var nbytes = size
            for each in entry.shape {
                let (product, overflow) = nbytes.multipliedReportingOverflow(by: each)
                guard each >= 0, !overflow else { throw GoldenVectors.unusable(name) }
                nbytes = product
            }
            guard entry.dtype == dtype, entry.dataOffsets.count == 2, entry.dataOffsets[0] >= 0,
                entry.dataOffsets[0] <= entry.dataOffsets[1],
                entry.dataOffsets[1] <= data.count - 8 - Int(length),
                entry.dataOffsets[1] - entry.dataOffsets[0] == nbytes
            else { throw GoldenVectors.unusable(name) }
            return (data[body + entry.dataOffsets[0]..<body + entry.dataOffsets[1]], entry.shape)
        }
        func numbers(_ name: String) throws -> [Int] {
            guard let (held, _) = try bytes(name, "I64", 8) else { throw GoldenVectors.unusable(name) }
            let raw = Array(held)
            return stride(from: 0, to: raw.count, by: 8).map { start in
                Int(Int64(bitPattern: (0..<8).reduce(UInt64(0)) { $0 | UInt64(raw[start + $1]) << (8 * UInt64($1)) }))
            }
        }
        func rows(_ name: String) throws -> [[Float]]? {
            guard let (held, shape) = try bytes(name, "F32", 4) else { return nil }
            guard shape.count == 2, shape[1] > 0 else { throw GoldenVectors.unusable(name) }
            let raw = Array(held)
            let values = stride(from: 0, to: raw.count, by: 4).map { start in
                Float(bitPattern: (0..<4).reduce(UInt32(0)) { $0 | UInt32(raw[start + $1]) << (8 * UInt32($1)) })
            }
            return (0..<shape[0]).map { Array(values[$0 * shape[1]..<($0 + 1) * shape[1]]) }
        }
        let tokens = try numbers("tokens")
        let prefill = try numbers("prefill")
        guard prefill.count == 1, prefill[0] > 0, prefill[0] <= tokens.count, let wanted = try rows("reference_logits"),
            wanted.count == tokens.count - prefill[0] + 1
        else { throw GoldenVectors.unusable("its prompt") }
        prompt = Array(tokens.prefix(prefill[0]))
        answer = Array(tokens.dropFirst(prefill[0]))
        reference = wanted
        artifact = try rows("artifact_logits")
    }

    private static func unusable(_ what: String) -> Failure {
        Failure(.goldenUnusable, "the golden vectors cannot be used: \(what)", fix: "Copy the bundle again.")
    }
}

/// How far logits are from the golden vectors'.
public struct GoldenComparison: Equatable, Sendable {
    /// Rows that were compared.
    public let steps: Int
    /// Largest difference from what the artifact gave where it was built, if the vectors have that.
    public let maxAbs: Double?
    /// Mean KL divergence in nats from the original model.
    public let kl: Double
    /// Share of steps where this and the original model choose the same token.
    public let top1: Double

    public init(_ golden: GoldenVectors, _ rows: [[Float]]) {
        steps = rows.count
        maxAbs = golden.artifact.map { zip($0, rows).map(EdgeExportBundle.maxAbs).max() ?? .infinity }
        kl = zip(golden.reference, rows).map(divergence).reduce(0, +) / Double(max(rows.count, 1))
        let alike = zip(golden.reference, rows).filter { largest($0) == largest($1) }.count
        top1 = Double(alike) / Double(max(rows.count, 1))
    }

    public func passes(_ gates: Manifest.Gates) -> Bool {
        kl <= gates.kl ?? .infinity && (maxAbs ?? 0) <= gates.maxAbs ?? .infinity
    }
}

/// Largest absolute difference of two rows; infinite where either has no finite number.
public func maxAbs(_ one: [Float], _ other: [Float]) -> Double {
    guard one.count == other.count, !one.isEmpty else { return .infinity }
    return zip(one, other).reduce(0) { worst, pair in
        let off = Double(abs(pair.0 - pair.1))
        return off.isFinite ? max(worst, off) : .infinity
    }
}

/// KL divergence in nats of the softmax of `got` from that of `wanted`.
public func divergence(_ wanted: [Float], _ got: [Float]) -> Double {
    guard wanted.count == got.count, !wanted.isEmpty else { return .infinity }
    let one = logProbabilities(wanted)
    let other = logProbabilities(got)
    let found = zip(one, other).reduce(0) { total, pair in total + exp(pair.0) * (pair.0 - pair.1) }
    return found.isFinite ? found : .infinity
}

private func logProbabilities(_ logits: [Float]) -> [Double] {
    let top = Double(logits.max() ?? 0)
    let total = log(logits.reduce(0) { sum, each in sum + exp(Double(each) - top) })
    return logits.map { Double($0) - top - total }
}
