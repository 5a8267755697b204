package dev.edgeexport;

/** What went wrong: the same codes as on every side of edgeexport, and what to do about it. */
public final class EdgeException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    private final String code;
    private final String what;
    private final String where;
    private final String why;
    private final String fix;

    EdgeException(String code, String what, String where, String why, String fix) {
        super("error[" + code + "]: " + what + "\n  where: " + where + "\n  why: " + why + "\n  fix: " + fix);
        this.code = code;
        this.what = what;
        this.where = where;
        this.why = why;
        this.fix = fix;
    }

    /** Kebab-case and permanent: session-closed, context-full, bundle-too-new. */
    public String getCode() {
        return code;
    }

    public String getWhat() {
        return what;
    }

    public String getWhere() {
        return where;
    }

    public String getWhy() {
        return why;
    }

    public String getFix() {
        return fix;
    }
}
