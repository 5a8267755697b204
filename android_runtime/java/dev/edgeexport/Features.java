package dev.edgeexport;

/** What the model sees of one picture, or hears in one sound: to be given with a prompt of the same bundle. */
public final class Features {
    final String component;
    final int rows;
    final int width;
    final float[] values;
    final int gridRows;
    final int gridColumns;

    Features(String component, int rows, int width, float[] values, int gridRows, int gridColumns) {
        this.component = component;
        this.rows = rows;
        this.width = width;
        this.values = values;
        this.gridRows = gridRows;
        this.gridColumns = gridColumns;
    }

    /** vision or audio. */
    public String getComponent() {
        return component;
    }

    /** How many vectors it is. */
    public int getRows() {
        return rows;
    }
}
