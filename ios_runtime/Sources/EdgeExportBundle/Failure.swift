/// A failure with a permanent code: the same codes as edgeexport's in Python, with what is wrong and what to do.
public struct Failure: Error, Equatable, CustomStringConvertible, Sendable {
    public enum Code: String, Sendable {
        case bundleNotFound = "bundle-not-found"
        case bundleBadManifest = "bundle-bad-manifest"
        case bundleTooNew = "bundle-too-new"
        case bundleFileMissing = "bundle-file-missing"
        case bundleFileChanged = "bundle-file-changed"
        case bundleUnsafePath = "bundle-unsafe-path"
        case bundleNoComponent = "bundle-no-component"
        case artifactDoesNotOpen = "artifact-does-not-open"
        case contextFull = "context-full"
        case badToken = "bad-token"
        case badTruncate = "bad-truncate"
        case badSampling = "bad-sampling"
        case sessionClosed = "session-closed"
        case nonfiniteLogits = "nonfinite-logits"
        case goldenUnusable = "golden-unusable"
        case goldenMismatch = "golden-mismatch"
    }

    public let code: Code
    public let what: String
    public let fix: String

    public init(_ code: Code, _ what: String, fix: String) {
        self.code = code
        self.what = what
        self.fix = fix
    }

    public var description: String { "error[\(code.rawValue)]: \(what). \(fix)" }
}
