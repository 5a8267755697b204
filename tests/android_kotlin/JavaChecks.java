// The API as a Java app uses it, and nulls, which Kotlin would not compile.
import dev.edgeexport.Answer;
import dev.edgeexport.BlockingSession;
import dev.edgeexport.EdgeOptions;
import dev.edgeexport.Features;
import dev.edgeexport.Message;
import dev.edgeexport.ResponseCache;
import dev.edgeexport.Sampling;
import dev.edgeexport.Token;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.util.Arrays;
import java.util.StringJoiner;

public final class JavaChecks {
    public static void main(String[] given) throws IOException {
        EdgeOptions options = new EdgeOptions().threads(2).onnxruntime(given[1]).litert(given[2]).cacheFolder(given[3]);
        try (BlockingSession session = BlockingSession.open(given[0], options)) {
            int[] prompt = {5, 6, 7, 8};
            System.out.println(ids(session.answer(prompt, Sampling.GREEDY, 16)));

            if (given.length > 4) {
                String[] picture = given[5].split(":");
                int height = Integer.parseInt(picture[2]);
                System.out.println(seen(session, given[4], picture[1], height, Integer.parseInt(picture[3])));
                return;
            }

            session.reset();
            float[] logits = new float[session.vocab()];
            session.prefill(prompt, logits);
            int best = session.greedy();
            for (float each : logits) if (each > logits[best]) throw new AssertionError("these are no logits");
            session.decode(best, logits);
            System.out.println(best + "," + session.greedy());

            try (ResponseCache cache = new ResponseCache()) {
                Message question = Message.user("Tap it");
                if (session.cached(cache, question) != null) throw new AssertionError("nothing was asked");
                String computed = text(session.answer(cache, 200, question));
                int position = session.position();
                if (!computed.equals(session.cached(cache, question))) throw new AssertionError("it was not kept");
                if (!computed.equals(text(session.answer(cache, 200, question)))) throw new AssertionError("another");
                if (session.position() != position) throw new AssertionError("it was computed again");
                refused(() -> session.answer((ResponseCache) null, 1, question));
                refused(() -> session.answer(cache, 1, (Message) null));
                refused(() -> session.answer(cache, 1, (Message[]) null));
                refused(() -> session.cached(cache, question, null));
                refused(() -> new ResponseCache(1, 1, 1, null));
            }

            refused(() -> BlockingSession.open(null, options));
            refused(() -> BlockingSession.open(given[0], null));
            refused(() -> BlockingSession.open(given[0], options.litert(null)));
            refused(() -> session.answer(null, Sampling.GREEDY, 1));
            refused(() -> session.answer(prompt, null, 1));
            refused(() -> session.answer(prompt, Sampling.GREEDY, 1, new dev.edgeexport.Features[] {null}));
            refused(() -> session.prefill(null, null));
            refused(() -> session.encodeImage(null, 1, 1));
            refused(() -> session.encodeAudio(null, 16000));
            refused(() -> session.tokenize(null, false));
            refused(() -> session.detokenize(null, false));
            refused(() -> session.render((Message) null));
            refused(() -> session.govern(null));
            refused(() -> Message.user(null));
            refused(() -> Message.image().withText(null));
            refused(() -> BlockingSession.verify(null));
        }
    }

    /** The ids of an answer to a prompt that shows a picture of raw RGB. */
    private static String seen(BlockingSession session, String prompt, String file, int height, int width)
            throws IOException {
        int[] tokens = Arrays.stream(prompt.split(",")).mapToInt(Integer::parseInt).toArray();
        Features picture = session.encodeImage(Files.readAllBytes(Paths.get(file)), height, width);
        session.reset();
        return ids(session.answer(tokens, Sampling.GREEDY, 16, picture));
    }

    private static String ids(Answer answer) {
        StringJoiner ids = new StringJoiner(",");
        for (Token token = answer.next(); token != null; token = answer.next()) {
            if (token.getId() != Token.NO_ID) ids.add("" + token.getId());
        }
        if (answer.finishReason() == null || answer.next() != null) throw new AssertionError("it did not end");
        return ids.toString();
    }

    private static String text(Answer answer) {
        StringBuilder text = new StringBuilder();
        for (Token token = answer.next(); token != null; token = answer.next()) text.append(token.getText());
        return text.toString();
    }

    private static void refused(Runnable action) {
        try {
            action.run();
        } catch (NullPointerException expected) {
            return;
        }
        throw new AssertionError("a null went through");
    }
}
