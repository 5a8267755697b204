// swift-tools-version: 6.0
// Loads bundles of edgeexport's ios-coreml targets. EdgeExportBundle is plain Swift and builds on Linux too;
// EdgeExportRuntime needs Core ML.
import PackageDescription

let package = Package(
    name: "EdgeExportRuntime",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "EdgeExportRuntime", targets: ["EdgeExportRuntime"]),
        .executable(name: "edgeexport-parity", targets: ["edgeexport-parity"]),
    ],
    targets: [
        .target(name: "EdgeExportBundle"),
        .target(name: "EdgeExportRuntime", dependencies: ["EdgeExportBundle"]),
        .executableTarget(name: "edgeexport-parity", dependencies: ["EdgeExportRuntime"]),
        .testTarget(name: "EdgeExportBundleTests", dependencies: ["EdgeExportBundle"]),
    ],
    swiftLanguageModes: [.v5]
)
