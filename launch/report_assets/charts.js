// Line charts and the heat map: inline SVG drawn at the real width of its box, so that text keeps its size on a phone.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes, appended to `parent`. */
function svg(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

/** An HTML element with a class and text, appended to `parent`. */
function html(parent, name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

/** Round numbers covering [low, high], about `count` of them. */
function niceTicks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

/** A number for axes: 12k, 1.5M, 0.02. */
function shortNumber(value) {
  const size = Math.abs(value);
  const trim = (text) => text.replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  if (size >= 1e9) return trim((value / 1e9).toFixed(2)) + "G";
  if (size >= 1e6) return trim((value / 1e6).toFixed(2)) + "M";
  if (size >= 1e4) return trim((value / 1e3).toFixed(1)) + "k";
  if (size >= 1 || value === 0) return trim(value.toFixed(2)).replace(/\B(?=(\d{3})+(?!\d))/g, size >= 1000 ? "," : "");
  return trim(value.toPrecision(3));
}

/** A number for tooltips, with the chart's number of decimals and thousands separated. */
function fullNumber(value, decimals) {
  return value.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

/** Show the tooltip beside a point of the window; `rows` are [colour, name, value]. */
function showTooltip(x, y, title, rows) {
  const box = document.getElementById("tooltip");
  box.replaceChildren();
  html(box, "b", "", title);
  for (const [colour, name, value] of rows) {
    const row = html(box, "span");
    if (colour) html(row, "i").style.setProperty("--swatch", colour);
    row.append(name);
    html(row, "em", "", value);
  }
  box.hidden = false;
  const width = box.offsetWidth, height = box.offsetHeight;
  box.style.left = Math.max(6, x + 16 + width > innerWidth ? x - width - 16 : x + 16) + "px";
  box.style.top = Math.max(6, Math.min(y - height / 2, innerHeight - height - 6)) + "px";
}

function hideTooltip() { document.getElementById("tooltip").hidden = true; }

/** Call `draw(width)` now and whenever the width of `host` changes. */
function onWidth(host, draw) {
  let last = 0;
  const update = () => {
    const width = host.clientWidth;
    if (width && width !== last) { last = width; draw(width); }
  };
  new ResizeObserver(update).observe(host);
  update();
}

/** The axes of a plot: grid lines, tick labels; returns the scales and the inner box. */
function drawAxes(root, width, height, spec, xRange, yRange) {
  const yTicks = niceTicks(yRange[0], yRange[1], 6);
  const longest = Math.max(...yTicks.map((tick) => shortNumber(tick).length));
  const box = { left: 10 + 7 * longest, right: width - 10, top: 8, bottom: height - 24 };
  const x = (value) => box.left + (value - xRange[0]) / (xRange[1] - xRange[0] || 1) * (box.right - box.left);
  const y = (value) => box.bottom - (value - yRange[0]) / (yRange[1] - yRange[0] || 1) * (box.bottom - box.top);
  for (const tick of yTicks) {
    svg(root, "line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) });
    svg(root, "text", { x: box.left - 7, y: y(tick) + 4, "text-anchor": "end" }, shortNumber(tick));
  }
  svg(root, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  for (const tick of niceTicks(xRange[0], xRange[1], Math.max(2, Math.floor(width / 64)))) {
    svg(root, "text", { x: x(tick), y: height - 6, "text-anchor": x(tick) > box.right - 14 ? "end" : "middle" }, shortNumber(tick));
  }
  return { x, y, box };
}

/** The range of all values of the shown series with a margin; starts at zero where the chart says so. */
function valueRange(series, fromZero) {
  let low = Infinity, high = -Infinity;
  for (const one of series) {
    if (one.faint) { // single spikes of a noisy curve must not squeeze the rest
      const sorted = one.points.map((point) => point[1]).sort((a, b) => a - b);
      low = Math.min(low, sorted[Math.floor(sorted.length * 0.01)]);
      high = Math.max(high, sorted[Math.ceil(sorted.length * 0.985) - 1]);
    } else for (const point of one.points) { low = Math.min(low, point[1]); high = Math.max(high, point[1]); }
  }
  if (fromZero) return [0, high > 0 ? high * 1.06 : 1];
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.05 || 1;
  return [low - margin, high + margin];
}

/** The point of a series whose x is nearest. */
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}

/** Draw the lines and dots of one series. */
function drawSeries(root, series, scales) {
  const colour = `var(--series-${series.color})`;
  let path = "";
  let previous = null;
  for (const [px, py] of series.points) {
    const x = scales.x(px).toFixed(1), y = scales.y(py).toFixed(1);
    path += previous === null ? `M${x} ${y}` : series.step ? `H${x}V${y}` : `L${x} ${y}`;
    previous = y;
  }
  const style = (series.faint ? " faint" : "") + (series.dashed ? " dashed" : "");
  svg(root, "path", { class: "line" + style, d: path, stroke: colour });
  if (series.dots || series.points.length === 1) for (const [px, py] of series.points)
    svg(root, "circle", { class: "dot", cx: scales.x(px), cy: scales.y(py), r: 3.6, fill: colour });
}

/** Fill `host` with one line chart: legend buttons that hide series, axes, lines, values on hover. */
function lineChart(host, spec) {
  const hidden = new Set();
  const legend = html(host, "div", "legend");
  const plot = html(host, "div", "plot");
  let redraw = () => {};
  for (const series of spec.series) {
    const button = html(legend, "button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    html(button, "i").style.setProperty("--swatch", `var(--series-${series.color})`);
    button.append(series.name);
    button.onclick = () => {
      if (!hidden.delete(series) && hidden.size < spec.series.length - 1) hidden.add(series);
      button.setAttribute("aria-pressed", String(!hidden.has(series)));
      redraw();
    };
  }
  onWidth(plot, (width) => { redraw = () => drawLines(plot, width, spec, spec.series.filter((one) => !hidden.has(one))); redraw(); });
}

function drawLines(plot, width, spec, shown) {
  const height = spec.height || 218;
  plot.replaceChildren();
  const root = svg(plot, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.title });
  const xRange = spec.x_range;
  const scales = drawAxes(root, width, height, spec, xRange, valueRange(shown, spec.zero));
  const clip = svg(svg(root, "defs", {}), "clipPath", { id: "clip-" + spec.id });
  svg(clip, "rect", { x: scales.box.left - 5, y: scales.box.top - 5, width: scales.box.right - scales.box.left + 10, height: scales.box.bottom - scales.box.top + 6 });
  const lines = svg(root, "g", { "clip-path": `url(#clip-${spec.id})` });
  for (const series of shown) drawSeries(lines, series, scales);
  const cursor = svg(root, "g", {});
  plot.onpointermove = (event) => {
    const x = event.clientX - plot.getBoundingClientRect().left;
    const at = nearest(shown.map((one) => nearest(one.points, xRange[0] + (x - scales.box.left) / (scales.box.right - scales.box.left) * (xRange[1] - xRange[0])))
      .sort((a, b) => a[0] - b[0]), xRange[0] + (x - scales.box.left) / (scales.box.right - scales.box.left) * (xRange[1] - xRange[0]))[0];
    cursor.replaceChildren();
    svg(cursor, "line", { class: "cursor", x1: scales.x(at), x2: scales.x(at), y1: scales.box.top, y2: scales.box.bottom });
    const rows = [];
    for (const series of shown) {
      const point = nearest(series.points, at);
      const colour = `var(--series-${series.color})`;
      if (point[0] === at || !series.dots) rows.push([colour, series.name, fullNumber(point[1], spec.decimals) + (spec.unit ? " " + spec.unit : "")]);
      if (point[0] === at && !series.faint) svg(cursor, "circle", { class: "dot", cx: scales.x(at), cy: scales.y(point[1]), r: 4, fill: colour });
    }
    showTooltip(event.clientX, event.clientY, "iteration " + fullNumber(at, 0), rows);
  };
  plot.onpointerleave = () => { cursor.replaceChildren(); hideTooltip(); };
}

/** Fill `host` with the histogram of keep probabilities (rows) over iterations (columns); shades are logarithmic. */
function heatMap(host, spec) {
  const plot = html(host, "div", "plot");
  const scale = html(host, "div", "heat-scale");
  scale.append("none"); html(scale, "i"); scale.append(`${fullNumber(spec.maximum, 0)} Gaussians in a cell (logarithmic)`);
  onWidth(plot, (width) => drawHeat(plot, width, spec));
}

function drawHeat(plot, width, spec) {
  const height = 250, rows = spec.counts[0].length, columns = spec.counts.length;
  plot.replaceChildren();
  const root = svg(plot, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.title });
  const box = { left: 40, right: width - 10, top: 8, bottom: height - 24 };
  const cell = { width: (box.right - box.left) / columns, height: (box.bottom - box.top) / rows };
  for (let column = 0; column < columns; column++) for (let row = 0; row < rows; row++) {
    const share = Math.log1p(spec.counts[column][row]) / Math.log1p(spec.maximum);
    svg(root, "rect", { x: (box.left + column * cell.width).toFixed(2), y: (box.bottom - (row + 1) * cell.height).toFixed(2),
      width: (cell.width + 0.3).toFixed(2), height: (cell.height - 0.6).toFixed(2), fill: "var(--series-1)", "fill-opacity": (spec.counts[column][row] ? 0.06 + 0.94 * share : 0.025).toFixed(3) });
  }
  for (const tick of [0, 0.25, 0.5, 0.75, 1])
    svg(root, "text", { x: box.left - 7, y: box.bottom - tick * (box.bottom - box.top) + 4, "text-anchor": "end" }, tick.toFixed(2));
  const half = box.bottom - 0.5 * (box.bottom - box.top);
  svg(root, "line", { class: "half", x1: box.left, x2: box.right, y1: half, y2: half });
  const every = Math.max(1, Math.ceil(columns / Math.max(2, width / 90)));
  for (let column = 0; column < columns; column += every)
    svg(root, "text", { x: box.left + (column + 0.5) * cell.width, y: height - 6, "text-anchor": "middle" }, shortNumber(spec.iterations[column]));
  plot.onpointermove = (event) => {
    const rect = plot.getBoundingClientRect();
    const column = Math.floor((event.clientX - rect.left - box.left) / cell.width), row = Math.floor((box.bottom - event.clientY + rect.top) / cell.height);
    if (column < 0 || column >= columns || row < 0 || row >= rows) return hideTooltip();
    const count = spec.counts[column][row], total = spec.counts[column].reduce((a, b) => a + b, 0) || 1;
    showTooltip(event.clientX, event.clientY, "iteration " + fullNumber(spec.iterations[column], 0), [
      ["", `keep probability ${(row / rows).toFixed(2)} to ${((row + 1) / rows).toFixed(2)}`, ""],
      ["var(--series-1)", fullNumber(count, 0) + " Gaussians", (100 * count / total).toFixed(1) + " %"]]);
  };
  plot.onpointerleave = hideTooltip;
}
