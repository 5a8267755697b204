package dev.edgeexport

import android.content.Context
import android.os.Build
import android.os.PowerManager
import android.os.SystemClock
import kotlin.time.Duration
import kotlin.time.Duration.Companion.seconds
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Job
import kotlinx.coroutines.delay
import kotlinx.coroutines.launch

/**
 * Android's thermal readings for a session's governor, until this or the session is closed or the scope is cancelled.
 * Before Android 10 there are none, and answers run at full rate.
 */
class ThermalReadings(
    context: Context,
    private val session: EdgeSession,
    scope: CoroutineScope,
    policy: GovernorPolicy = GovernorPolicy(1.0),
    period: Duration = 10.seconds, // getThermalHeadroom is not to be asked more often
) : AutoCloseable {
    private val power = context.getSystemService(Context.POWER_SERVICE) as PowerManager
    private val reading: Job

    init {
        session.govern(policy)
        reading = scope.launch {
            while (Build.VERSION.SDK_INT >= Build.VERSION_CODES.Q && report()) delay(period)
        }
    }

    /** False where the session was closed. */
    private fun report(): Boolean = try {
        session.report(SystemClock.elapsedRealtimeNanos() / NANOS, load())
        true
    } catch (problem: EdgeException) {
        if (problem.code != "session-closed") throw problem
        false
    }

    /** The worse of status and headroom: one of them is missing or constant on many devices. */
    private fun load(): Double {
        val status = BlockingSession.loadOfStatus(power.currentThermalStatus)
        if (Build.VERSION.SDK_INT < Build.VERSION_CODES.R) return status
        val headroom = power.getThermalHeadroom(0).toDouble() // NaN where there is none, or it was asked too soon
        return if (headroom > status) headroom else status
    }

    override fun close() = reading.cancel()

    private companion object {
        const val NANOS = 1e9
    }
}
