// One chart, drawn by BokehJS, which the server serves from the installed package.
//
// A plot is created for one configuration of lines, scale and colours, and only its data change;
// for anything else it is rebuilt. The colours are the page's own.

export const hasBokeh = () => typeof window.Bokeh?.Plotting?.figure === "function";

const probe = document.createElement("span");

/** Resolve a colour of the style sheet, light or dark. */
function colour(name) {
  if (!probe.isConnected) {
    probe.hidden = true;
    document.body.append(probe);
  }
  probe.className = `ink-${name}`;
  return getComputedStyle(probe).color;
}

const TICKS = {
  number: () => new Bokeh.BasicTickFormatter({ precision: "auto" }),
  log: () => new Bokeh.NumeralTickFormatter({ format: "0.[00000]" }),
  count: () => new Bokeh.NumeralTickFormatter({ format: "0,0" }),
  rate: () => new Bokeh.NumeralTickFormatter({ format: "0.[0000000000]" }),
  decimal: () => new Bokeh.NumeralTickFormatter({ format: "0.[00]" }),
};
const TIPS = { number: "0.0000", count: "0,0", rate: "0.00e+0", decimal: "0.00" };

export class Plot {
  /**
   * `shape`: {height, isTime, isLog, format, lines: [{field, label, ink, weight, source}], hasBand,
   * hasDots}; a line's weight is "thin" (the raw values) or "bold". Lines with a source of their
   * own have steps of their own, and each its own figure under the pointer.
   */
  constructor(place, shape) {
    this.sources = Object.fromEntries(
      ["main", "dots", "marks", ...shape.lines.map(sourceOf)].map((name) => [name, new Bokeh.ColumnDataSource({ data: {} })]),
    );
    place.replaceChildren();
    const figure = Bokeh.Plotting.figure({
      height: shape.height,
      sizing_mode: "stretch_width",
      toolbar_location: null,
      tools: [],
      x_axis_type: shape.isTime ? "datetime" : "linear",
      y_axis_type: shape.isLog ? "log" : "linear",
      y_range: new Bokeh.DataRange1d(shape.isFromZero ? { start: 0 } : {}),
      min_border: 4,
      outline_line_color: null,
      background_fill_color: null,
      border_fill_color: null,
    });
    this.#style(figure, shape);
    this.#fill(figure, shape);
    this.shown = Bokeh.Plotting.show(figure, place);
  }

  /** Show other data: {main: {x, ...fields}, dots: {x, y}, marks: {x}}. */
  set(data) {
    for (const [name, source] of Object.entries(this.sources)) {
      if (data[name]) source.data = data[name];
    }
  }

  /** Take the plot off the page. */
  async remove() {
    for (const view of [await this.shown].flat()) view?.remove?.();
  }

  #style(figure, shape) {
    const soft = colour("soft");
    for (const axis of [figure.xaxis, figure.yaxis].flatMap((found) => [...found])) {
      axis.axis_line_color = colour("edge");
      axis.major_tick_line_color = null;
      axis.minor_tick_line_color = null;
      axis.major_label_text_color = soft;
      axis.major_label_text_font = "system-ui";
      axis.major_label_text_font_size = "11px";
      axis.major_label_standoff = 4;
    }
    for (const grid of [figure.xgrid, figure.ygrid].flatMap((found) => [...found])) {
      grid.grid_line_color = colour("edge");
    }
    for (const grid of figure.xgrid) grid.visible = false;
    const [xaxis] = [...figure.xaxis];
    const [yaxis] = [...figure.yaxis];
    if (shape.isTime) {
      const format = { minutes: "%H:%M", minsec: "%H:%M:%S", seconds: "%H:%M:%S", hours: "%H:%M" };
      xaxis.formatter = new Bokeh.DatetimeTickFormatter(format);
      xaxis.ticker.desired_num_ticks = 4;
    } else {
      xaxis.formatter = new Bokeh.NumeralTickFormatter({ format: "0,0" });
      xaxis.ticker.desired_num_ticks = 5;
      xaxis.ticker.min_interval = 1; // of few steps none is labelled twice
    }
    yaxis.formatter = TICKS[shape.isLog ? "log" : shape.format]();
    yaxis.ticker.desired_num_ticks = shape.height > 200 ? 6 : 4;
    figure.x_range.range_padding = 0.01;
  }

  #fill(figure, shape) {
    const { main, dots, marks } = this.sources;
    const x = { field: "x" };
    figure.vspan(x, { source: marks, line_color: colour("warn"), line_dash: { value: [3, 3] } });
    if (shape.hasBand) {
      const band = { y1: { field: "low" }, y2: { field: "high" }, fill_color: colour(shape.lines[0].ink) };
      figure.varea({ x, ...band, fill_alpha: 0.12, source: main });
    }
    const drawn = shape.lines.map((line) =>
      figure.line({
        x,
        y: { field: line.field },
        source: this.sources[sourceOf(line)],
        line_color: colour(line.ink),
        line_width: line.weight === "bold" ? 2 : 1,
        line_alpha: line.weight === "thin" ? 0.4 : 1,
        line_join: "round",
      }),
    );
    if (shape.hasDots) {
      const ink = colour("held");
      figure.line({ x, y: { field: "y" }, source: dots, line_color: ink, line_width: 1.5 });
      figure.scatter({ x, y: { field: "y" }, source: dots, size: 6, color: ink });
    }
    const at = shape.isTime ? ["at", "@x{%H:%M:%S}"] : ["step", "@x{0,0}"];
    const tip = (line) => [line.label, `@${line.field}{${TIPS[shape.format]}}`];
    const hover = (renderers, tooltips) =>
      new Bokeh.HoverTool({
        renderers,
        mode: "vline",
        tooltips,
        formatters: shape.isTime ? { "@x": "datetime" } : {},
      });
    const isShared = shape.lines.every((line) => sourceOf(line) === "main");
    figure.add_tools(
      ...(isShared
        ? [hover(drawn.slice(-1), [at, ...shape.lines.map(tip)])]
        : drawn.map((line, number) => hover([line], [at, tip(shape.lines[number])]))),
      new Bokeh.CrosshairTool({ dimensions: "height", line_color: soft(), line_alpha: 0.5 }),
    );
  }
}

const sourceOf = (line) => line.source ?? "main";
const soft = () => colour("soft");
