import Foundation
import XCTest

@testable import EdgeExportBundle

final class BundleTests: XCTestCase {
    func testPromptsAreCutIntoPieces() {
        let cut = pieces(of: 70, at: 0, size: 64, context: 512)
        XCTAssertEqual(cut, [Piece(start: 0, count: 64, several: true), Piece(start: 64, count: 6, several: true)])
        XCTAssertEqual(pieces(of: 1, at: 9, size: 64, context: 512), [Piece(start: 0, count: 1, several: false)])
    }

    func testNoPieceReachesBeyondTheCache() {
        for position in 0..<32 {
            for count in 1...(32 - position) {
                let cut = pieces(of: count, at: position, size: 8, context: 32)
                XCTAssertEqual(cut.map(\.count).reduce(0, +), count)
                XCTAssert(cut.allSatisfy { position + $0.start + ($0.several ? 8 : 1) <= 32 })
            }
        }
    }

    func testHashes() {
        var hash = SHA256Stream()
        hash.update(Array("ab".utf8))
        hash.update(Array("c".utf8))
        // FIPS 180-4's own example
        XCTAssertEqual(hash.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    }

    func testAnotherSchemaIsTooNew() {
        let data = Data(#"{"schema": "edgeexport.bundle/2"}"#.utf8)
        XCTAssertThrowsError(try Manifest.read(data)) { XCTAssertEqual(($0 as? Failure)?.code, .bundleTooNew) }
    }

    func testPathsStayInside() {
        XCTAssert(Manifest.isSafe("decoder.mlpackage/Manifest.json"))
        for path in ["/etc/passwd", "../x", "a//b", "a/./b", "", "c:\\x"] {
            XCTAssertFalse(Manifest.isSafe(path), path)
        }
    }

    func testGreedyAndSampledChoices() throws {
        var random = SplitMix64(seed: 1)
        let logits: [Float] = [0, 3, 3, -1]
        XCTAssertEqual(try Sampling().choose(logits, using: &random), 1)
        let sampling = try Sampling(temperature: 1, topK: 2)
        for _ in 0..<50 {
            XCTAssert([1, 2].contains(sampling.choose(logits, using: &random)))
        }
        XCTAssertThrowsError(try Sampling(topP: 0))
    }

    func testHeatIsSaidOnlyWhenItChangesSomething() {
        let pace = Pace()
        XCTAssertNil(pace.remark(from: .nominal, to: .fair))
        XCTAssertNotNil(pace.remark(from: .fair, to: .serious))
        XCTAssertEqual(pace.pause(.nominal), 0)
    }

    func testEqualRowsDoNotDiverge() {
        XCTAssertEqual(divergence([1, 2, 3], [2, 3, 4]), 0, accuracy: 1e-6)
        XCTAssertEqual(maxAbs([1, 2], [1, 4]), 2)
        XCTAssertEqual(maxAbs([1], [.nan]), .infinity)
    }

    func testReportsAreJSON() throws {
        let failed = DeviceReport.row(Failure(.badToken, "one\ntwo", fix: ""), opened: true, units: "all")
        XCTAssertEqual(failed.failure, DeviceReport.Reason(code: "bad-token", what: "onetwo"))
        let metrics = DeviceReport.Metrics(steps: 9, maxAbs: .infinity)
        let row = DeviceReport.Row(level: "L4", units: "all", metrics: metrics, failure: nil)
        let device = DeviceReport.Device(model: "Mac16,5", system: "macOS 15")
        let report = DeviceReport(
            bundle: String(repeating: "0", count: 64), component: "decoder", device: device,
            date: Date(timeIntervalSince1970: 0), rows: [row]
        )
        let text = String(decoding: try report.json(), as: UTF8.self)
        XCTAssert(text.contains(#""date" : "1970-01-01T00:00:00Z""#))
        XCTAssert(text.contains(#""max_abs" : "Infinity""#))
        XCTAssertFalse(text.contains("failure"))
    }
}
