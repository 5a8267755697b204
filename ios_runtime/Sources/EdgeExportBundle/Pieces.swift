/// One call of the decoder: `count` tokens of a prompt from `start` on. With `several` it is a call of `prefill`,
/// padded to that function's size; else one of `decode`.
public struct Piece: Equatable, Sendable {
    public let start: Int
    public let count: Int
    public let several: Bool
}

/// How a prompt of `count` tokens, at `position` of a cache of `context` slots, is cut for a `prefill` of `size`.
///
/// A padded piece writes `size` slots. What the padding writes is overwritten before a token may attend to it, but a
/// piece must not reach beyond the cache: there, tokens go one by one.
public func pieces(of count: Int, at position: Int, size: Int, context: Int) -> [Piece] {
    var found: [Piece] = []
    var done = 0
    while done < count {
        let several = size > 1 && count - done > 1 && position + done + size <= context
        let piece = Piece(start: done, count: several ? min(size, count - done) : 1, several: several)
        found.append(piece)
        done += piece.count
    }
    return found
}
