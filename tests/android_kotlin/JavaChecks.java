// The API as a Java app uses it, and nulls, which Kotlin would not compile.
import dev.edgeexport.Answer;
import dev.edgeexport.BlockingSession;
import dev.edgeexport.EdgeOptions;
import dev.edgeexport.Message;
import dev.edgeexport.Sampling;
import dev.edgeexport.Token;

public final class JavaChecks {
    public static void main(String[] given) {
        EdgeOptions options = new EdgeOptions().threads(2).onnxruntime(given[1]).litert(given[2]).cacheFolder(given[3]);
        try (BlockingSession session = BlockingSession.open(given[0], options)) {
            int[] prompt = {5, 6, 7, 8};
            Answer answer = session.answer(prompt, Sampling.GREEDY, 16);
            StringBuilder ids = new StringBuilder();
            for (Token token = answer.next(); token != null; token = answer.next()) {
                if (token.getId() != Token.NO_ID) ids.append(ids.length() == 0 ? "" : ",").append(token.getId());
            }
            if (answer.finishReason() == null || answer.next() != null) throw new AssertionError("it did not end");
            System.out.println(ids);

            session.reset();
            float[] logits = new float[session.vocab()];
            session.prefill(prompt, logits);
            int best = session.greedy();
            for (float each : logits) if (each > logits[best]) throw new AssertionError("these are no logits");
            session.decode(best, logits);
            System.out.println(best + "," + session.greedy());

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
            refused(() -> BlockingSession.verify(null));
        }
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
