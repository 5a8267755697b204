// edgeexport-parity BUNDLE [report.json]: runs a bundle's golden vectors on this Mac, for each choice of compute units,
// and writes what it measured, for `edgeexport parity BUNDLE --import report.json`. Exits with 6 when a gate is missed.
#if canImport(CoreML)
import CoreML
import Darwin
import EdgeExportBundle
import EdgeExportRuntime
import Foundation

let choices: [(String, MLComputeUnits)] = [
    ("cpuOnly", .cpuOnly), ("cpuAndGPU", .cpuAndGPU), ("cpuAndNeuralEngine", .cpuAndNeuralEngine), ("all", .all),
]

/// The rows of one choice of units, and whether the bundle's gates hold there.
func measure(_ bundle: ModelBundle, _ name: String, _ units: MLComputeUnits) async -> ([DeviceReport.Row], Bool) {
    var opened = false
    do {
        let session = try await Session(bundle, units: units)
        opened = true
        let found = try await session.measure()
        return (DeviceReport.rows(found, units: name), found.passes(bundle.manifest.golden.gates))
    } catch {
        return ([DeviceReport.row(error, opened: opened, units: name)], false)
    }
}

func hardwareModel() -> String {
    var size = 0
    guard sysctlbyname("hw.model", nil, &size, nil, 0) == 0, size > 1 else { return "Mac" }
    var bytes = [UInt8](repeating: 0, count: size)
    guard sysctlbyname("hw.model", &bytes, &size, nil, 0) == 0 else { return "Mac" }
    return String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
}

guard CommandLine.arguments.count >= 2 else {
    print("edgeexport-parity BUNDLE [report.json]")
    exit(2)
}
let bundle: ModelBundle
do {
    bundle = try ModelBundle(at: URL(fileURLWithPath: CommandLine.arguments[1]))
} catch {
    print(error)
    exit(8)
}
var rows: [DeviceReport.Row] = []
var good = true
for (name, units) in choices {
    let (found, passed) = await measure(bundle, name, units)
    rows += found
    good = good && passed
}
let system = "macOS \(ProcessInfo.processInfo.operatingSystemVersionString)"
let device = DeviceReport.Device(model: hardwareModel(), system: system)
let measured = DeviceReport(bundle: bundle.digest, component: "decoder", device: device, date: Date(), rows: rows)
let report = try measured.json()
if CommandLine.arguments.count > 2 {
    try report.write(to: URL(fileURLWithPath: CommandLine.arguments[2]))
} else {
    print(String(decoding: report, as: UTF8.self))
}
exit(good ? 0 : 6)
#else
print("Core ML is needed: run this on a Mac")
#endif
