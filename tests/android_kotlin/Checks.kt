// Checks of the Kotlin API, run on a JVM against a bundle: `ChecksKt NAME BUNDLE ONNXRUNTIME LITERT CACHE [MORE...]`,
// where the first of MORE is a prompt's token ids.
package dev.edgeexport

import android.content.Context
import android.os.PowerManager
import android.os.SystemClock
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.TimeZone
import java.util.concurrent.atomic.AtomicInteger
import kotlin.concurrent.thread
import kotlin.time.Duration.Companion.milliseconds
import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.collect
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.yield

class Given(arguments: Array<String>) {
    val bundle = arguments[1]
    val options = EdgeOptions().threads(2).onnxruntime(arguments[2]).litert(arguments[3]).cacheFolder(arguments[4])
    val prompt = (arguments.getOrNull(5) ?: "5,6,7,8").split(",").map { it.toInt() }.toIntArray()
    val more = arguments.drop(6)

    suspend fun open() = EdgeSession.open(bundle, options)
    fun blocking(): BlockingSession = BlockingSession.open(bundle, options)
}

fun expect(wanted: Any?, found: Any?) = check(wanted == found) { "expected $wanted, found $found" }

/** The code of what is thrown, or "" where nothing is. */
inline fun code(action: () -> Unit): String = try {
    action()
    ""
} catch (problem: EdgeException) {
    for (part in listOf(problem.what, problem.where, problem.why, problem.fix)) {
        check(part.isNotEmpty() && part in problem.message!!) { "$problem does not say everything" }
    }
    problem.code
}

/** Prints an answer's ids, its text as hexadecimal UTF-8, and why it ended. */
suspend fun answer(given: Given) = given.open().use { session ->
    session.selfCheck()
    expect(0, session.position)
    var reason: FinishReason? = null
    val tokens = session.answer(given.prompt, maxTokens = 16, onEnd = { reason = it }).toList()
    println(tokens.filter { it.id != Token.NO_ID }.joinToString(",") { it.id.toString() })
    println(tokens.joinToString("") { it.text }.toByteArray().joinToString("") { "%02x".format(it) })
    println(reason)
    session.reset()
    val sampling = Sampling.GREEDY.temperature(0.8).topP(0.9).topK(40).seed(7)
    println(session.answer(given.prompt, sampling = sampling, maxTokens = 16).toList().joinToString(",") { "${it.id}" })
}

/** Prints a conversation's tokens, and what they read. */
fun text(given: Given) = given.blocking().use { session ->
    val prompt = session.prompt(Message.system("Be brief."), Message.user("Grüße 👋🏽"))
    println(prompt.joinToString(","))
    expect(session.render(Message.system("Be brief."), Message.user("Grüße 👋🏽")), session.detokenize(prompt, false))
    expect("bad-text", code { session.tokenize("half a pair: \uD83D", false) })
    expect("chat-template-failed", code { session.render(Message.assistant("I begin."), Message.assistant("Twice.")) })
}

/** What `picture:FILE:HEIGHT:WIDTH` and `sound:FILE:RATE` show: raw RGB, raw float32. */
suspend fun encoded(session: EdgeSession, medium: String): Features {
    val parts = medium.split(":")
    val bytes = File(parts[1]).readBytes()
    if (parts[0] == "picture") return session.encodeImage(bytes, parts[2].toInt(), parts[3].toInt())
    val samples = FloatArray(bytes.size / 4)
    ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(samples)
    return session.encodeAudio(samples, parts[2].toInt())
}

/** Prints the ids of an answer to a prompt that shows pictures and sounds, then what else is wrong with them. */
suspend fun shown(given: Given) = given.open().use { session ->
    val features = given.more.map { encoded(session, it) }
    check(features.all { it.rows > 0 })
    println(session.answer(given.prompt, features, maxTokens = 16).toList().joinToString(",") { "${it.id}" })
    session.reset()
    suspend fun refused(shown: List<Features>) = check(code { session.answer(given.prompt, shown).collect() } != "")
    for (seen in features.filter { it.component == "vision" }) {
        for ((height, width) in listOf(2 to 3, 2 to 1, 0 to 4, -2 to -2, Int.MAX_VALUE to 2)) {
            expect("not-an-image", code { session.encodeImage(ByteArray(12), height, width) })
        }
        val wide = Features("vision", 1, seen.width + 1, FloatArray(seen.width + 1), 1, 1)
        refused(listOf(wide))
        if (features.size == 1) refused(features + seen) // but where every token sees all
    }
    if (features.any { it.component == "audio" }) {
        expect("bad-sound", code { session.encodeAudio(FloatArray(0), 16000) })
        expect("bad-sound", code { session.encodeAudio(floatArrayOf(Float.NaN), 16000) })
        expect("bad-sample-rate", code { session.encodeAudio(FloatArray(16), 0) })
        expect("bad-sample-rate", code { session.encodeAudio(FloatArray(16), -1) })
        expect("sound-too-long", code { session.encodeAudio(FloatArray(50_000_000), 16000) })
    }
    expect(0, session.position)
}

/** A [ResponseCache]'s clock: half past eleven in the evening, where it is half past two in Greenwich. */
class Evening {
    var now = 1_800_023_400_000 // milliseconds

    init {
        TimeZone.setDefault(TimeZone.getTimeZone("GMT+9"))
    }

    companion object {
        const val HOUR = 3_600_000L
    }
}

/** Which answers a cache gives again, and to whom. */
suspend fun cached(given: Given) {
    val time = Evening()
    fun cache(entries: Int = 3, bytes: Long = 100_000) = ResponseCache(entries, bytes, 7200.0) { time.now }
    suspend fun EdgeSession.ask(cache: ResponseCache, text: String): List<Token> =
        answer(cache, Message.user(text)).toList()
    fun text(answer: List<Token>) = answer.joinToString("") { it.text }
    fun ids(answer: List<Token>) = answer.map { it.id }.filter { it != Token.NO_ID }

    given.open().use { session ->
        cache().use { cache ->
            expect(null, session.cached(cache, Message.user("Tap  it")))
            var reason: FinishReason? = null
            val computed = session.answer(cache, Message.user("Tap  it"), maxTokens = 200) { reason = it }.toList()
            expect(FinishReason.STOP, reason)
            println(ids(computed).joinToString(","))
            expect(1, cache.size())
            val stays = session.position
            reason = null
            val again = session.answer(cache, Message.user("Tap  it"), maxTokens = 1) { reason = it }.toList()
            expect(FinishReason.STOP, reason)
            expect(listOf(Token.NO_ID to text(computed)), again.map { it.id to it.text })
            expect(stays, session.position)
            for (same in listOf("Tap it", " Tap\t it ")) {
                expect(text(computed), session.cached(cache, Message.user(same)))
            }
            for (new in listOf("tap it", "Tap\nit", "Tapit")) expect(null, session.cached(cache, Message.user(new)))
            expect(null, session.cached(cache, Message.system("Tap it"), Message.user("Tap it")))
            expect(null, session.cached(cache, Message.user("Tap it"), Message.assistant("Why?"), Message.user("Go")))
            // what was asked first is computed as if nothing had been asked before
            cache.clear()
            expect(ids(computed), ids(session.ask(cache, "Tap  it")))
        }
        cache().use { cache -> // only what the model ended by itself, and what was heard to its end
            session.answer(cache, Message.user("Tap  it"), maxTokens = 1).collect()
            session.answer(cache, Message.user("Tap  it")).take(1).collect()
            expect(0, cache.size())
            check(code { session.answer(cache, Message.image().withText("What?")).collect() }.isNotEmpty())
            check(code { session.answer(cache, Message.user("word ".repeat(5000))).collect() } == "context-full")
            expect(0, cache.size())
        }
        cache().use { cache -> // age
            session.ask(cache, "Tap  it")
            time.now += 2 * Evening.HOUR
            check(session.cached(cache, Message.user("Tap  it")) != null)
            time.now += 1
            expect(null, session.cached(cache, Message.user("Tap  it")))
            time.now -= 1 + 2 * Evening.HOUR
        }
        cache().use { cache -> // dates
            for (said in listOf("What is the date?", "On 21.11.2026")) {
                expect(true, session.ask(cache, said).isNotEmpty())
                time.now += Evening.HOUR / 2 - 1
                check(session.cached(cache, Message.user(said)) != null)
                time.now += 1 // midnight
                expect(null, session.cached(cache, Message.user(said)))
                time.now -= Evening.HOUR / 2
            }
            cache.clear()
            session.ask(cache, "What time is it?")
            expect(0, cache.size())
            // asked before midnight, and answered after it
            session.answer(cache, Message.user("What is the date?")).collect { time.now += Evening.HOUR }
            expect(1, cache.size())
            expect(null, session.cached(cache, Message.user("What is the date?")))
        }
        cache(entries = 2).use { cache -> // number
            for (each in listOf("one", "two", "one", "three")) session.ask(cache, each)
            expect(listOf(true, false, true), listOf("one", "two", "three").map {
                session.cached(cache, Message.user(it)) != null
            })
            expect(2, cache.size())
        }
        cache(bytes = 50).use { cache ->
            session.ask(cache, "one")
            expect(0, cache.size())
        }
        ResponseCache().use { cache -> // other bundles, on the device's own clock
            session.ask(cache, "Tap  it")
            check(session.cached(cache, Message.user("Tap  it")) != null)
            for (other in given.more) {
                EdgeSession.open(other, given.options).use { expect(null, it.cached(cache, Message.user("Tap  it"))) }
            }
            given.blocking().use { check(it.cached(cache, Message.user("Tap  it")) != null) }
        }
    }
    misusedCache(given)
}

suspend fun misusedCache(given: Given) {
    expect("bad-argument", code { ResponseCache(-1, 1, 1.0) { 0 } })
    expect("bad-argument", code { ResponseCache(1, -1, 1.0) { 0 } })
    expect("bad-argument", code { ResponseCache(1, 1, Double.NaN) { 0 } })
    given.open().use { session ->
        val cache = ResponseCache()
        val hello = Message.user("Hello")
        val running = session.answer(cache, hello)
        List(4) { thread { repeat(100) { runBlocking { session.cached(cache, hello) } } } }.forEach { it.join() }
        cache.close()
        cache.close()
        expect("cache-closed", code { cache.size() })
        expect("cache-closed", code { cache.clear() })
        expect("cache-closed", code { running.collect() })
        expect("cache-closed", code { session.cached(cache, hello) })
        session.close()
        ResponseCache().use { open -> expect("session-closed", code { session.answer(open, hello).collect() }) }
    }
    given.blocking().use { session ->
        val cache = ResponseCache()
        val behind = session.answer(cache, 200, Message.user("Tap  it"))
        session.prefill(given.prompt, null) // what is answered behind this is no answer to the conversation alone
        expect("answer-interrupted", code { behind.next() })
        expect(given.prompt.size, session.position())
        val answer = session.answer(cache, 200, Message.user("Tap  it"))
        cache.close()
        expect("cache-closed", code { while (answer.next() != null) { /* its end */ } })
        expect(null, answer.next())
        val nowhere = longArrayOf(0, -1, Long.MAX_VALUE, Long.MIN_VALUE)
        for (handle in nowhere) {
            expect("cache-closed", code { Native.cacheSize(handle) })
            expect("", code { Native.closeCache(handle) })
        }
    }
    // a cache's memory is given back when it is closed
    val session = given.options.run { Native.open(given.bundle, threads, onnxruntime, litert, cacheFolder, verified) }
    val long = "x".repeat(900_000)
    fun filled() = ResponseCache().use { cache ->
        cache.ask(session, Message.user("Tap it")).accept(long)
        expect(1, cache.size())
    }
    repeat(20) { filled() }
    val memory = resident()
    repeat(100) { filled() }
    Native.close(session)
    check(resident() - memory < 50_000) { "caches were not given back: ${resident() - memory} kB more" }
}

/** A collector that stops leaves the session where it was, at once free for the next answer. */
suspend fun cancel(given: Given) = given.open().use { session ->
    val size = given.prompt.size
    for (round in 1..20) {
        session.reset()
        val taken = session.answer(given.prompt, maxTokens = 64).take(3).toList()
        expect(3, taken.size)
        val stopped = session.position
        check(stopped in size + 2..size + 3) { "it went on to $stopped" }
        delay(5)
        expect(stopped, session.position)
    }
    for (round in 1..20) {
        session.reset()
        val received = AtomicInteger()
        runBlocking {
            val job = launch(Dispatchers.Default) {
                session.answer(given.prompt, maxTokens = 64).collect { received.incrementAndGet() }
            }
            while (received.get() < 2) yield()
            job.cancelAndJoin()
        }
        val stopped = session.position
        check(stopped <= size + received.get() + 1) { "after ${received.get()} tokens it went on to $stopped" }
        expect("", code { session.truncate(stopped) })  // nothing runs any more
    }
    val reached = runBlocking { // an answer that waits for its governor is cancelled in its sleep
        session.reset()
        session.govern(GovernorPolicy(1.0).steps(0.0001, 2.0).rates(0.0001, 1.0))
        session.report(0.0, 2.0)
        val received = AtomicInteger()
        val job = launch(Dispatchers.Default) {
            session.answer(given.prompt, maxTokens = 64).collect { received.incrementAndGet() }
        }
        while (received.get() < 1) yield()
        job.cancelAndJoin()
        received.get()
    }
    expect(1, reached)
}

/** A prompt that is longer than one piece of 512: the same answer, and a collector that stops while it is taken in. */
suspend fun pieces(given: Given) {
    val long = IntArray(1100) { it % 200 }
    given.blocking().use { session ->
        session.prefill(long, null)
        val wanted = session.greedy()
        session.reset()
        val answer = session.answer(long, Sampling.GREEDY, 4)
        for (taken in listOf(512, 1024)) {
            expect(true, answer.feed())
            expect(taken, session.position())
        }
        expect(false, answer.feed())
        expect(1024, session.position())
        expect(wanted, answer.next().id)
        expect(wanted, session.run { reset(); answer(long, Sampling.GREEDY, 4).next().id })
        expect("context-full", code { session.answer(long, Sampling.GREEDY, 4).next() })
        expect(long.size, session.position())
        session.reset()
        val moved = session.answer(long, Sampling.GREEDY, 4)
        moved.feed()
        session.truncate(7)
        expect("answer-interrupted", code { moved.feed() })
    }
    given.open().use { session ->
        val stopped = (1..20).minOf {
            session.reset()
            runBlocking {
                val job = launch(Dispatchers.Default) { session.answer(long, maxTokens = 64).collect() }
                while (session.position < 512) yield()
                job.cancelAndJoin()
            }
            session.position
        }
        check(stopped < long.size) { "it always went on to $stopped" }
    }
}

suspend fun misuse(given: Given) {
    expect("bundle-not-found", code { EdgeSession.open("/nowhere/at/all") })
    expect("bundle-not-found", code { EdgeSession.verify("/nowhere/at/all") })
    expect("runtime-missing", code { EdgeSession.open(given.bundle, given.options.onnxruntime("x.so").litert("x.so")) })
    EdgeSession.verify(given.bundle)
    check("our JVM" in EdgeSession.deviceReport(given.bundle, given.options, "our JVM", "Linux"))
    val session = given.open()
    val prompt = given.prompt
    val huge = IntArray(50_000_000) { 1 }
    suspend fun answered(tokens: IntArray, sampling: Sampling = Sampling.GREEDY, most: Int = 4) =
        code { session.answer(tokens, sampling = sampling, maxTokens = most).collect() }
    suspend fun shown(features: Features) = code { session.answer(prompt, listOf(features)).collect() }
    expect("bad-token", answered(intArrayOf()))
    expect("bad-token", answered(intArrayOf(1, -1)))
    expect("bad-token", answered(intArrayOf(session.vocab)))
    expect("context-full", answered(huge))
    expect("bad-sampling", answered(prompt, most = 0))
    expect("bad-sampling", answered(prompt, Sampling.GREEDY.temperature(Double.NaN)))
    expect("bad-sampling", answered(prompt, Sampling.GREEDY.topK(-1)))
    expect("bad-sampling", answered(prompt, Sampling.GREEDY.seed(-1)))
    expect("bad-truncate", code { session.truncate(1) })
    expect("bad-truncate", code { session.truncate(-1) })
    expect("modality-missing", code { session.encodeImage(ByteArray(12), 2, 2) })
    expect("not-an-image", code { session.encodeImage(ByteArray(12), Int.MAX_VALUE, Int.MAX_VALUE) })
    expect("not-an-image", code { session.encodeImage(ByteArray(12), -2, -2) })
    expect("modality-missing", code { session.encodeAudio(FloatArray(16), 16000) })
    expect("modality-missing", shown(Features("vision", 1, 2, FloatArray(2), 1, 1)))
    expect("bad-argument", shown(Features("vision", 9, 9, FloatArray(2), 1, 1)))
    expect("bad-policy", code { session.govern(GovernorPolicy(-1.0)) })
    expect(0, session.position)
    session.close()
    session.close()
    expect("session-closed", answered(prompt))
    expect("session-closed", code { session.reset() })
    expect("session-closed", code { session.context })
    expect("session-closed", code { session.prompt(Message.user("?")) })
    expect("session-closed", code { session.report(0.0, 1.0) })

    given.blocking().use { blocking ->
        expect("bad-token", code { blocking.greedy() })
        expect("bad-argument", code { blocking.prefill(prompt, FloatArray(3)) })
        expect("bad-argument", code { blocking.prefill(prompt, FloatArray(blocking.vocab() + 1)) })
        expect("context-full", code { blocking.prefill(huge, null) })
        val first = blocking.answer(prompt, Sampling.GREEDY, 8)
        expect(null, first.finishReason())
        first.next()
        blocking.decode(1, null)
        expect("answer-interrupted", code { first.next() })
        blocking.reset()
        val second = blocking.answer(prompt, Sampling.GREEDY, 8)
        expect("answer-interrupted", code { first.next() })
        second.next()
    }
    for (handle in longArrayOf(0, -1, 1, 12345, Long.MAX_VALUE, Long.MIN_VALUE)) {
        expect("session-closed", code { Native.decode(handle, 1, null) })
        expect("session-closed", code { Native.next(handle, 1, arrayOfNulls(1)) })
        expect("", code { Native.close(handle) })
    }
}

/** Calls from several threads: each is made or refused, and those that were made are in the cache. */
fun threads(given: Given) {
    repeat(20) {
        given.blocking().use { session ->
            val made = AtomicInteger()
            val refused = AtomicInteger()
            List(4) {
                thread {
                    val logits = FloatArray(session.vocab())
                    for (k in 0 until 30) {
                        when (val found = code { session.decode(k % 17, logits) }) {
                            "" -> made.incrementAndGet()
                            "session-busy" -> refused.incrementAndGet()
                            else -> expect("context-full", found)
                        }
                        code { session.greedy() }
                        code { session.report(k.toDouble(), 0.5) }
                    }
                }
            }.forEach { it.join() }
            expect(made.get(), session.position())
        }
    }
}

/** Sessions that are closed while they decode, by another thread, and twice. */
fun close(given: Given) {
    repeat(20) { round ->
        val session = given.blocking()
        var last = ""
        val decoding = thread {
            while (last.isEmpty()) {
                last = code {
                    session.prefill(given.prompt, null)
                    while (session.position() < session.context()) session.decode(session.greedy(), null)
                    session.reset()
                }
            }
        }
        Thread.sleep(round.toLong())
        val other = thread { session.close() }
        session.close()
        other.join()
        decoding.join()
        expect("session-closed", last)
    }
    runBlocking {
        val session = given.open()
        val received = AtomicInteger()
        val collecting = async(Dispatchers.Default) {
            code {
                while (true) {
                    session.reset()
                    session.answer(given.prompt, maxTokens = 64).collect { received.incrementAndGet() }
                }
            }
        }
        while (received.get() < 2) yield()
        session.close()
        expect("session-closed", collecting.await())
    }
}

/** Kilobytes of memory that this process holds. */
fun resident(): Int = Regex("VmRSS:\\s+(\\d+)").find(File("/proc/self/status").readText())!!.groupValues[1].toInt()

/** Threads of this process: each open session has one of its own beside the caller's. */
fun running(): Int = File("/proc/self/task").list()!!.size

/** Opens, answers, failures and cancelled opens, over and over: nothing stays. */
suspend fun leaks(given: Given) {
    suspend fun round() {
        repeat(20) {
            given.open().use { session ->
                session.answer(given.prompt, maxTokens = 4).collect()
                code { session.answer(intArrayOf(-1)).collect() }
            }
            runBlocking {
                val opening = launch(start = CoroutineStart.UNDISPATCHED) { given.open().close() }
                delay(1)
                opening.cancelAndJoin()
            }
        }
        System.gc()
    }
    repeat(3) { round() }
    val memory = resident()
    val threads = running()
    repeat(6) { round() }
    println("after 240 sessions: ${resident() - memory} kB and ${running() - threads} threads more")
    check(resident() - memory < 12_000) { "memory was not given back" }
    check(running() - threads < 20) { "sessions were not given back" }
}

suspend fun governed(given: Given) = given.open().use { session ->
    expect(1.0, session.report(0.0, 5.0)) // nobody governs yet
    session.govern(GovernorPolicy(1.0))
    expect(1.0, session.report(0.0, 0.5))
    expect(0.8, session.report(1.0, 0.95))
    given.blocking().use { blocking ->
        blocking.govern(GovernorPolicy(1.0).steps(0.01, 2.0).rates(0.01, 1.0).patience(1.0, 1.0).band(0.5, 0.9))
        expect(0.01, blocking.report(0.0, 2.0))
        val answer = blocking.answer(given.prompt, Sampling.GREEDY, 8)
        answer.next()
        val started = System.nanoTime()
        val paused = answer.pauseNanos()
        check(paused > 0) { "a hundredth of the rate, and no pause" }
        answer.next()
        check(System.nanoTime() - started >= paused) { "it did not wait" }
    }
}

/** Android's readings reach the governor, and end with the session. */
fun thermal(given: Given) = runBlocking {
    val session = given.open()
    val power = PowerManager()
    SystemClock.nanos = 1
    val readings = ThermalReadings(Context(power), session, this)
    delay(50)
    expect(1, power.asked)
    expect(1.0, session.report(1.0, 0.8)) // cool, so far: headroom NaN, status none
    readings.close()
    for ((status, headroom) in listOf(PowerManager.THERMAL_STATUS_SEVERE to Float.NaN, 0 to 1.2f)) {
        SystemClock.nanos += 100_000_000_000
        power.status = status
        power.headroom = headroom
        ThermalReadings(Context(power), session, this).use { delay(50) }
        expect(0.8, session.report(SystemClock.nanos / 1e9 + 1, 0.8))
    }
    // one reading after the other
    power.headroom = 1.2f
    ThermalReadings(Context(power), session, this, GovernorPolicy(1.0), 20.milliseconds).use {
        repeat(5) {
            SystemClock.nanos += 10_000_000_000
            delay(100)
        }
    }
    check(session.report(SystemClock.nanos / 1e9 + 1, 0.8) < 0.5) { "it read no more than once" }
    ThermalReadings(Context(power), session, this)
    session.close() // the loop of these readings ends by itself, else this scope would wait for it
}

val CHECKS: Map<String, suspend (Given) -> Unit> = mapOf(
    "answer" to ::answer,
    "text" to { text(it) },
    "cancel" to ::cancel,
    "pieces" to ::pieces,
    "shown" to ::shown,
    "cached" to ::cached,
    "misuse" to ::misuse,
    "threads" to { threads(it) },
    "close" to { close(it) },
    "leaks" to ::leaks,
    "governed" to ::governed,
    "thermal" to { thermal(it) },
)

fun main(arguments: Array<String>) = runBlocking { CHECKS.getValue(arguments[0])(Given(arguments)) }
