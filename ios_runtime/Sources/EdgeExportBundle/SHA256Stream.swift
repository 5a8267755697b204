#if canImport(CryptoKit)
import CryptoKit
import Foundation

/// SHA-256 of bytes that come in pieces, as lower-case hexadecimal digits.
public struct SHA256Stream {
    private var hash = SHA256()

    public init() {}

    public mutating func update(_ bytes: [UInt8]) {
        hash.update(data: bytes)
    }

    public func finish() -> String {
        hash.finalize().map { byte in hexadecimal(byte) }.joined()
    }
}
#else

/// SHA-256 of bytes that come in pieces, as lower-case hexadecimal digits. Source: FIPS 180-4.
public struct SHA256Stream {
    private var state: [UInt32] = [
        0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
    ]
    private var pending: [UInt8] = []
    private var count: UInt64 = 0

    public init() {}

    public mutating func update(_ bytes: [UInt8]) {
        count += UInt64(bytes.count)
        pending += bytes
        var start = 0
        while pending.count - start >= 64 {
            block(Array(pending[start..<start + 64]))
            start += 64
        }
        pending.removeFirst(start)
    }

    public func finish() -> String {
        var rest = self
        let bits = count * 8
        var padding: [UInt8] = [0x80]
        padding += [UInt8](repeating: 0, count: (119 - pending.count % 64) % 64)
        padding += (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * UInt64($0))) }
        rest.update(padding)
        return rest.state.map { word in
            (0..<4).map { hexadecimal(UInt8(truncatingIfNeeded: word >> (24 - 8 * UInt32($0)))) }.joined()
        }.joined()
    }

    private mutating func block(_ bytes: [UInt8]) {
        var words = [UInt32](repeating: 0, count: 64)
        for i in 0..<16 {
            words[i] = (0..<4).reduce(UInt32(0)) { value, k in value << 8 | UInt32(bytes[4 * i + k]) }
        }
        for i in 16..<64 {
            let low = turned(words[i - 15], 7) ^ turned(words[i - 15], 18) ^ (words[i - 15] >> 3)
            let high = turned(words[i - 2], 17) ^ turned(words[i - 2], 19) ^ (words[i - 2] >> 10)
            words[i] = words[i - 16] &+ low &+ words[i - 7] &+ high
        }
        var v = state
        for i in 0..<64 {
            let high = turned(v[4], 6) ^ turned(v[4], 11) ^ turned(v[4], 25)
            let choice = (v[4] & v[5]) ^ (~v[4] & v[6])
            let first = v[7] &+ high &+ choice &+ roundConstants[i] &+ words[i]
            let low = turned(v[0], 2) ^ turned(v[0], 13) ^ turned(v[0], 22)
            let majority = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2])
            v = [first &+ low &+ majority, v[0], v[1], v[2], v[3] &+ first, v[4], v[5], v[6]]
        }
        for i in 0..<8 {
            state[i] = state[i] &+ v[i]
        }
    }
}

private func turned(_ word: UInt32, _ places: UInt32) -> UInt32 {
    word >> places | word << (32 - places)
}

/// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
private let roundConstants: [UInt32] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
]
#endif

private func hexadecimal(_ byte: UInt8) -> String {
    let digits = String(byte, radix: 16)
    return byte < 16 ? "0" + digits : digits
}
