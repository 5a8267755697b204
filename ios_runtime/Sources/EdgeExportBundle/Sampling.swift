import Foundation

/// Chooses the next token out of logits. A temperature of 0 takes the largest.
public struct Sampling: Sendable {
    public var temperature: Float
    public var topK: Int
    public var topP: Float

    /// Throws `bad-sampling` for numbers that mean nothing.
    public init(temperature: Float = 0, topK: Int = 0, topP: Float = 1) throws {
        guard temperature >= 0, temperature.isFinite, topK >= 0, topP > 0, topP <= 1 else {
            throw Failure(
                .badSampling, "temperature \(temperature), topK \(topK), topP \(topP) do not make a choice",
                fix: "Use a temperature from 0 on, topK from 0 on, topP above 0 and up to 1."
            )
        }
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
    }

    public func choose(_ logits: [Float], using random: inout SplitMix64) -> Int {
        guard temperature > 0 else { return largest(logits) }
        var order = Array(logits.indices).sorted { logits[$0] > logits[$1] }
        if topK > 0 {
            order = Array(order.prefix(topK))
        }
        let top = logits[order[0]]
        var weights = order.map { exp((logits[$0] - top) / temperature) }
        let total = weights.reduce(0, +)
        var kept = 0
        var sum: Float = 0
        while kept < weights.count, sum < topP * total {
            sum += weights[kept]
            kept += 1
        }
        weights = Array(weights.prefix(max(1, kept)))
        var left = random.unit() * weights.reduce(0, +)
        for (place, weight) in weights.enumerated() {
            left -= weight
            if left <= 0 { return order[place] }
        }
        return order[weights.count - 1]
    }
}

/// The place of the largest; the first of several.
public func largest(_ values: [Float]) -> Int {
    var best = 0
    for (place, value) in values.enumerated() where value > values[best] {
        best = place
    }
    return best
}

/// Random numbers that are the same for the same seed. Source: Steele, Lea and Flood, OOPSLA 2014.
public struct SplitMix64: Sendable {
    private var state: UInt64

    public init(seed: UInt64) {
        state = seed
    }

    public mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }

    /// From 0 to below 1.
    public mutating func unit() -> Float {
        Float(next() >> 40) / Float(1 << 24)
    }
}
