#if canImport(CoreML)
import CoreML
import EdgeExportBundle
import Foundation

/// One conversation with the decoder of a bundle: the contract of edgeexport's sessions in every language.
public actor Session {
    public private(set) var position = 0
    public let bundle: ModelBundle
    private var decoder: PackageDecoder?
    private let pace: Pace
    private var heat = Heat.nominal
    private let say: @Sendable (String) -> Void

    /// `units` are those that the bundle was laid out for, unless others are given. `say` is told what is done about
    /// heat. Throws what the bundle and Core ML have against it.
    public init(
        _ bundle: ModelBundle, units: MLComputeUnits? = nil, pace: Pace = Pace(),
        say: @escaping @Sendable (String) -> Void = { _ in }
    ) async throws {
        self.bundle = bundle
        self.pace = pace
        self.say = say
        let suited: MLComputeUnits = bundle.suitsNeuralEngine ? .cpuAndNeuralEngine : .cpuAndGPU
        decoder = try await PackageDecoder(bundle, units: units ?? suited)
    }

    /// Append tokens; the logits of the last one. The position stays where it was when this throws `bad-token`,
    /// `context-full`, `session-closed` or `nonfinite-logits`.
    public func prefill(_ tokens: [Int]) throws -> [Float] {
        let decoder = try opened()
        let vocab = decoder.vocab
        guard !tokens.isEmpty, tokens.allSatisfy({ 0 <= $0 && $0 < vocab }) else {
            throw Failure(.badToken, "tokens are ids from 0 to \(vocab - 1), at least one", fix: "Tokenize again.")
        }
        guard position + tokens.count <= decoder.context else {
            throw Failure(
                .contextFull, "\(tokens.count) more tokens do not fit into the cache of \(decoder.context)",
                fix: "Truncate or reset the session, or build the bundle with a longer --context."
            )
        }
        let logits = try decoder.step(tokens, at: position)
        position += tokens.count
        return logits
    }

    public func decode(_ token: Int) throws -> [Float] {
        try prefill([token])
    }

    /// Forget all tokens but the first `length`. Throws `bad-truncate`, `session-closed`.
    public func truncate(_ length: Int) throws {
        _ = try opened()
        guard 0 <= length, length <= position else {
            throw Failure(
                .badTruncate, "\(length) tokens cannot be kept of \(position)",
                fix: "Give a number from 0 to the position."
            )
        }
        position = length
    }

    public func reset() throws {
        try truncate(0)
        decoder?.reset()
    }

    /// Release the model and its cache.
    public func close() {
        decoder = nil
    }

    /// The answer to a prompt, token by token, to a stop token, `limit` tokens or the end of the cache.
    public nonisolated func answer(
        _ prompt: [Int], limit: Int, sampling: Sampling, seed: UInt64 = 0
    ) -> AsyncThrowingStream<Int, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    var random = SplitMix64(seed: seed)
                    var logits = try await prefill(prompt)
                    for _ in 0..<limit {
                        let token = sampling.choose(logits, using: &random)
                        if bundle.stopIds.contains(token) { break }
                        continuation.yield(token)
                        guard try await hasRoom(), !Task.isCancelled else { break }
                        try await cool()
                        logits = try await decode(token)
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// What the golden vectors say. The session is reset before and after.
    public func measure() throws -> GoldenComparison {
        guard let file = bundle.manifest.golden.file,
            let data = try? Data(contentsOf: bundle.folder.appendingPathComponent(file))
        else {
            throw Failure(.goldenUnusable, "the bundle has no golden vectors", fix: "Build it with --parity L4 or L5.")
        }
        let golden = try GoldenVectors(data)
        try reset()
        var rows = [try prefill(golden.prompt)]
        for token in golden.answer {
            rows.append(try decode(token))
        }
        try reset()
        return GoldenComparison(golden, rows)
    }

    /// `measure`; throws `golden-mismatch` beyond the bundle's gates.
    public func selfCheck() throws -> GoldenComparison {
        let found = try measure()
        guard found.passes(bundle.manifest.golden.gates) else {
            let off = found.maxAbs.map { ", largest difference \($0)" } ?? ""
            throw Failure(
                .goldenMismatch, "this device computes something else: KL \(found.kl)\(off)",
                fix: "Try computeUnits .cpuOnly; report both results with the device's model."
            )
        }
        return found
    }

    private func opened() throws -> PackageDecoder {
        guard let decoder else {
            throw Failure(.sessionClosed, "the session is closed", fix: "Open a new one.")
        }
        return decoder
    }

    private func hasRoom() throws -> Bool {
        position < (try opened().context)
    }

    /// Pause as the policy says, and say so when it changes.
    private func cool() async throws {
        let now = Heat(ProcessInfo.processInfo.thermalState)
        if let remark = pace.remark(from: heat, to: now) { say(remark) }
        heat = now
        if pace.pause(now) > 0 {
            try await Task.sleep(nanoseconds: UInt64(pace.pause(now) * 1e9))
        }
    }
}

extension Heat {
    init(_ state: ProcessInfo.ThermalState) {
        switch state {
        case .fair: self = .fair
        case .serious: self = .serious
        case .critical: self = .critical
        default: self = .nominal
        }
    }
}
#endif
