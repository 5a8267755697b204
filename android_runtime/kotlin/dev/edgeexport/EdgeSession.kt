package dev.edgeexport

import kotlin.coroutines.cancellation.CancellationException
import kotlin.time.Duration.Companion.nanoseconds
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.delay
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.withContext

/**
 * One conversation with a bundle's model, for coroutines. All failures are an [EdgeException].
 *
 * One call runs at a time: another that comes meanwhile is refused with session-busy. [close] may be called from any
 * thread, and again; a call that runs then ends with session-closed.
 */
class EdgeSession private constructor(
    private val session: BlockingSession,
    private val worker: CoroutineDispatcher,
) : AutoCloseable {
    /** Tokens in the cache. */
    val position: Int get() = session.position()

    /** Tokens that the cache can hold. */
    val context: Int get() = session.context()

    /** How many token ids there are. */
    val vocab: Int get() = session.vocab()

    /** The ids that end an answer. */
    val stopIds: LongArray get() = session.stopIds()

    /** The tokens of a conversation that the model is to answer. */
    suspend fun prompt(vararg messages: Message): IntArray = withContext(worker) { session.prompt(*messages) }

    /** What the model sees of a picture: height * width * 3 bytes RGB, row by row from the top. */
    suspend fun encodeImage(rgb: ByteArray, height: Int, width: Int): Features =
        withContext(worker) { session.encodeImage(rgb, height, width) }

    /** What the model hears in samples of one channel, full scale -1 to 1. */
    suspend fun encodeAudio(samples: FloatArray, rate: Int): Features =
        withContext(worker) { session.encodeAudio(samples, rate) }

    /**
     * An answer behind what is in the cache, begun when it is collected: each token as soon as it is there.
     *
     * A collector that is cancelled, or has enough, stops it after the token, or the 512 of the prompt, that are
     * being computed; what is in the cache then stays there. `onEnd` hears why an answer ended by itself.
     */
    fun answer(
        prompt: IntArray,
        shown: List<Features> = emptyList(),
        sampling: Sampling = Sampling.GREEDY,
        maxTokens: Int = 256,
        onEnd: (FinishReason) -> Unit = {},
    ): Flow<Token> = tokens(onEnd) { session.answer(prompt, sampling, maxTokens, *shown.toTypedArray()) }

    /**
     * The greedy answer to a whole conversation. Where the cache has it, it is one piece without an id, and the session
     * stays as it is. Else the session is reset and computes it, and the cache keeps what the model ended by itself.
     */
    fun answer(
        cache: ResponseCache,
        vararg messages: Message,
        maxTokens: Int = 256,
        onEnd: (FinishReason) -> Unit = {},
    ): Flow<Token> = tokens(onEnd) { session.answer(cache, maxTokens, *messages) }

    /** The answer that a cache has for a conversation, or null. */
    suspend fun cached(cache: ResponseCache, vararg messages: Message): String? =
        withContext(worker) { session.cached(cache, *messages) }

    private fun tokens(onEnd: (FinishReason) -> Unit, begin: () -> Answer): Flow<Token> = flow {
        val answer = begin()
        while (answer.feed()) currentCoroutineContext().ensureActive()
        while (true) {
            delay(answer.pauseNanos().nanoseconds)
            emit(answer.compute() ?: break)
        }
        onEnd(checkNotNull(answer.finishReason()))
    }.buffer(Channel.RENDEZVOUS).flowOn(worker)

    /** Forgets all tokens but the first ones. */
    fun truncate(length: Int) = session.truncate(length)

    fun reset() = session.reset()

    /** Replays the golden vectors of text; throws where a gate is missed. The session is reset. */
    suspend fun selfCheck() = withContext(worker) { session.selfCheck() }

    /** From now on, answers slow down as readings ask for it. */
    fun govern(policy: GovernorPolicy) = session.govern(policy)

    /** A reading, taken at these seconds of a clock that never goes back; gives the decode rate from now on. */
    fun report(seconds: Double, reading: Double): Double = session.report(seconds, reading)

    /** Waits for the end of a running call, which is soon, and releases the model. */
    override fun close() = session.close()

    companion object {
        /** Opens the bundle in a folder of the app's. Its calls run on [worker]. */
        suspend fun open(
            folder: String,
            options: EdgeOptions = EdgeOptions(),
            worker: CoroutineDispatcher = Dispatchers.Default,
        ): EdgeSession {
            var opened: BlockingSession? = null
            try {
                withContext(worker) { opened = BlockingSession.open(folder, options) }
            } catch (cancelled: CancellationException) {
                opened?.close() // nobody else knows of it
                throw cancelled
            }
            return EdgeSession(checkNotNull(opened), worker)
        }

        /** Reads every file of a bundle and compares its hash: right after a download. */
        suspend fun verify(folder: String) = withContext(Dispatchers.IO) { BlockingSession.verify(folder) }

        /** Measures the golden vectors, and gives the JSON that `edgeexport parity BUNDLE --import` reads. */
        suspend fun deviceReport(folder: String, options: EdgeOptions, model: String, system: String): String =
            withContext(Dispatchers.Default) { BlockingSession.deviceReport(folder, options, model, system) }
    }
}
