package dev.edgeexport;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Objects;

/** One message of a conversation: text, and places of pictures, in their order. */
public final class Message {
    final String role;
    final List<String> parts; // null is the place of a picture

    private Message(String role, List<String> parts) {
        this.role = role;
        this.parts = parts;
    }

    public static Message system(String text) {
        return new Message("system", said(text));
    }

    public static Message user(String text) {
        return new Message("user", said(text));
    }

    public static Message assistant(String text) {
        return new Message("assistant", said(text));
    }

    /** A message of the user that begins with a picture. */
    public static Message image() {
        return new Message("user", Collections.singletonList(null));
    }

    /** With the place of a picture behind what it has; the picture itself is a feature of the prompt. */
    public Message withImage() {
        return with(null);
    }

    public Message withText(String text) {
        return with(Objects.requireNonNull(text, "text"));
    }

    private static List<String> said(String text) {
        return Collections.singletonList(Objects.requireNonNull(text, "text"));
    }

    private Message with(String part) {
        List<String> longer = new ArrayList<>(parts);
        longer.add(part);
        return new Message(role, longer);
    }
}
