/// How warm the device says it is.
public enum Heat: Int, Comparable, Sendable {
    case nominal, fair, serious, critical

    public static func < (one: Heat, other: Heat) -> Bool { one.rawValue < other.rawValue }
}

/// What is done about heat: pauses after each token, so that the system need not slow everything down; never silently.
public struct Pace: Sendable {
    /// Seconds after each token, by heat.
    public var pauses: [Heat: Double]

    public init(pauses: [Heat: Double] = [.nominal: 0, .fair: 0, .serious: 0.05, .critical: 0.25]) {
        self.pauses = pauses
    }

    public func pause(_ heat: Heat) -> Double { pauses[heat] ?? 0 }

    /// What to tell the user when the heat changes, or nil where the pause stays as it was.
    public func remark(from old: Heat, to new: Heat) -> String? {
        guard pause(old) != pause(new) else { return nil }
        if pause(new) == 0 { return "The device has cooled: answers are at full speed again." }
        return "The device is warm: a pause of \(Int(1000 * pause(new))) ms follows each token."
    }
}
