// edgeexport-parity BUNDLE [report.json]: runs a bundle's golden vectors on this Mac, for each choice of compute units,
// and writes what it measured. Exits with 6 when a gate is missed.
#if canImport(CoreML)
import CoreML
import EdgeExportBundle
import EdgeExportRuntime
import Foundation

struct Row: Encodable {
    let units: String
    let verdict: String
    let maxAbs: Double?
    let kl: Double?
    let note: String
}

struct Report: Encodable {
    let schema = "edgeexport.device-parity/1"
    let system: String
    let rows: [Row]
}

let choices: [(String, MLComputeUnits)] = [("cpuOnly", .cpuOnly), ("cpuAndGPU", .cpuAndGPU), ("all", .all)]

func measure(_ bundle: ModelBundle, _ name: String, _ units: MLComputeUnits) async -> Row {
    do {
        let session = try await Session(bundle, units: units)
        let found = try await session.selfCheck()
        return Row(units: name, verdict: "PASS", maxAbs: found.maxAbs, kl: found.kl, note: "")
    } catch {
        return Row(units: name, verdict: "FAIL", maxAbs: nil, kl: nil, note: "\(error)")
    }
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
var rows: [Row] = []
for (name, units) in choices {
    rows.append(await measure(bundle, name, units))
}
let encoder = JSONEncoder()
encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
let report = try encoder.encode(Report(system: ProcessInfo.processInfo.operatingSystemVersionString, rows: rows))
if CommandLine.arguments.count > 2 {
    try report.write(to: URL(fileURLWithPath: CommandLine.arguments[2]))
} else {
    print(String(decoding: report, as: UTF8.self))
}
exit(rows.contains { $0.verdict == "FAIL" } ? 6 : 0)
#else
print("Core ML is needed: run this on a Mac")
#endif
