package dev.edgeexport;

import java.util.ArrayList;
import java.util.List;

/** Messages as Native takes them: each one's role and number of parts, and the parts of all; null is a picture. */
final class Messages {
    final String[] roles;
    final int[] counts;
    final String[] parts;

    Messages(Message... messages) {
        roles = new String[messages.length];
        counts = new int[messages.length];
        List<String> all = new ArrayList<>();
        for (int i = 0; i < messages.length; ++i) {
            roles[i] = messages[i].role;
            counts[i] = messages[i].parts.size();
            all.addAll(messages[i].parts);
        }
        parts = all.toArray(new String[0]);
    }
}
