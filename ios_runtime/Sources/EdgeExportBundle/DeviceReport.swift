import Foundation

/// What a device measured over a bundle's golden vectors: JSON that `edgeexport parity BUNDLE --import` reads.
/// It holds no verdicts; those are made from the bundle's gates where it is read.
public struct DeviceReport: Encodable, Sendable {
    public let schema = "edgeexport.device-parity/1"
    /// SHA-256 of manifest.json, which lists the hashes of all files.
    public let bundle: String
    public let component: String
    public let device: Device
    /// UTC, as 2026-11-21T12:00:00Z.
    public let date: String
    public let rows: [Row]

    public struct Device: Encodable, Sendable {
        public let model: String
        public let system: String

        public init(model: String, system: String) {
            self.model = model
            self.system = system
        }
    }

    /// One level of the ladder on one choice of compute units: metrics, or why there are none.
    public struct Row: Encodable, Equatable, Sendable {
        public let level: String
        public let units: String
        public let metrics: Metrics
        public let failure: Reason?
    }

    public struct Metrics: Encodable, Equatable, Sendable {
        public var steps: Int?
        public var maxAbs: Double?
        public var kl: Double?
        public var top1: Double?

        private enum CodingKeys: String, CodingKey { case steps, maxAbs = "max_abs", kl, top1 }
    }

    public struct Reason: Encodable, Equatable, Sendable {
        public let code: String
        public let what: String
    }

    public init(bundle: String, component: String, device: Device, date: Date, rows: [Row]) {
        self.bundle = bundle
        self.component = component
        self.device = device
        self.date = ISO8601DateFormatter().string(from: date)
        self.rows = rows
    }

    /// The rows of what was measured: it opened, its difference from the artifact, its difference from the model.
    public static func rows(_ found: GoldenComparison, units: String) -> [Row] {
        let opened = Row(level: "L1", units: units, metrics: Metrics(), failure: nil)
        let model = Metrics(steps: found.steps, kl: found.kl, top1: found.top1)
        let last = Row(level: "L5", units: units, metrics: model, failure: nil)
        guard let maxAbs = found.maxAbs else { return [opened, last] }
        let artifact = Metrics(steps: found.steps, maxAbs: maxAbs)
        return [opened, Row(level: "L4", units: units, metrics: artifact, failure: nil), last]
    }

    /// What no text of a report may hold: line ends would be one.
    private static let unseen: [Unicode.GeneralCategory] = [.control, .format, .surrogate, .privateUse, .unassigned]

    /// The row of a failure: of level 1 where the package did not open, else of the level that needs no artifact.
    public static func row(_ error: Error, opened: Bool, units: String) -> Row {
        let known = error as? Failure
        let text = known?.what ?? String(describing: error)
        let shown = text.unicodeScalars.filter { !unseen.contains($0.properties.generalCategory) }.prefix(1000)
        let what = shown.isEmpty ? "no reason given" : String(shown.map(Character.init))
        let reason = Reason(code: known?.code.rawValue ?? "unexpected", what: what)
        return Row(level: opened ? "L5" : "L1", units: units, metrics: Metrics(), failure: reason)
    }

    /// Numbers that JSON does not have become the strings "NaN" and "Infinity".
    public func json() throws -> Data {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
        encoder.nonConformingFloatEncodingStrategy = .convertToString(
            positiveInfinity: "Infinity", negativeInfinity: "-Infinity", nan: "NaN"
        )
        return try encoder.encode(self)
    }
}
