// The loader as an Android library module, for Android Gradle plugin 9, which compiles Kotlin itself. With version 8,
// add id("org.jetbrains.kotlin.android") to the plugins.
import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    id("com.android.library")
}

android {
    namespace = "dev.edgeexport"
    compileSdk = 36
    defaultConfig {
        minSdk = 24
        ndk { abiFilters += listOf("arm64-v8a", "armeabi-v7a", "x86_64") }
        externalNativeBuild { cmake { targets += "edgeexport_jni" } }
        consumerProguardFiles("consumer-rules.pro")
    }
    externalNativeBuild { cmake { path = file("cpp/CMakeLists.txt") } }
    sourceSets.named("main") {
        manifest.srcFile("AndroidManifest.xml")
        java.setSrcDirs(listOf("java"))
        kotlin.setSrcDirs(listOf("kotlin", "android"))
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
}

kotlin { compilerOptions { jvmTarget = JvmTarget.JVM_1_8 } }

dependencies {
    api("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.8.1")
    // The runtime that the app's bundles need; delete the other.
    runtimeOnly("com.microsoft.onnxruntime:onnxruntime-android:1.31.0")
    runtimeOnly("com.google.ai.edge.litert:litert:2.3.0")
}
