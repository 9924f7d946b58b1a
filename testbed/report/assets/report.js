// Draws the figures of the page, and makes its tables sort and filter. Reads the JSON in #data; loads nothing.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("data").textContent);
  // The same way to a figure looks the same in every plot: by colour, by symbol, by dashes.
  const STYLES = {
    polled: ["polled", "circle"], doorbell: ["doorbell", "square"], adaptive: ["adaptive", "triangle"],
    copy: ["polled", "circle"], map: ["doorbell", "square"], handover: ["adaptive", "triangle"], idc: ["polled", "circle"],
    limit: ["limit", "plus", "6 3"], limit2: ["limit", "times", "2 3"], ring: ["limit", "plus", "6 3"],
    "nbd-local": ["limit", "plus", "6 3"],
    tcp: ["peer", "diamond", "8 2 2 2"], "nbd-tcp": ["peer", "diamond", "8 2 2 2"], "virtio-net": ["peer", "diamond", "8 2 2 2"],
    unix: ["peer", "star", "8 2 2 2"], "virtio-blk": ["peer2", "wye", "4 2"], iceoryx2: ["peer2", "wye", "4 2"],
    vsock: ["peer2", "star", "4 2"], "idc-tcp": ["adaptive", "asterisk", "8 2 2 2"], boot: ["polled", "circle"],
    better: ["adaptive", "triangle"], worse: ["doorbell", "square"], "no-difference": ["limit", "circle"],
    "cannot-tell": ["limit", "times"],
  };
  const style = (name) => {
    const [color, symbol, dash] = STYLES[name] ?? ["other", "hexagon", "3 3"];
    return {color: `var(--c-${color})`, symbol, dash: dash ?? "none"};
  };

  // -- numbers as people read them
  const digits = (value) => Number(value.toPrecision(3)).toLocaleString("en", {maximumSignificantDigits: 3, useGrouping: false});
  const stepped = (value, steps, last) => {
    for (const [bound, unit] of steps) if (Math.abs(value) >= bound * 0.9995) return `${digits(value / bound)} ${unit}`;
    return `${digits(value)} ${last}`.trim();
  };
  const FORMATS = {
    time: (value) => stepped(value, [[1e9, "s"], [1e6, "ms"], [1e3, "us"]], "ns"),
    bytes: (value) => stepped(value, [[2 ** 20, "MiB"], [2 ** 10, "KiB"]], "B"),
    rate: (value) => stepped(value, [[1e9, "GB/s"], [1e6, "MB/s"], [1e3, "kB/s"]], "B/s"),
    ops: (value) => stepped(value, [[1e6, "M"], [1e3, "k"]], ""),
    percent: (value) => `${digits(value * 100)} %`,
    tail: (value) => `p${Number((100 - 100 * 10 ** -value).toFixed(2))}`,
    times: (value) => `${digits(value)}\u00d7`,
    change: (value) => `${value > 0 ? "+" : ""}${digits(value * 100)} %`,
    plain: digits,
  };

  // -- axes
  const extent = (values) => [d3.min(values), d3.max(values)];
  function scale(axis, values, room) {
    let [low, high] = extent(values);
    if (axis.format === "percent") return {type: "linear", domain: [0, 1], ticks: [0, 0.25, 0.5, 0.75, 1]};
    if (axis.format === "tail") {
      const ticks = [[0.5, "p50"], [0.9, "p90"], [0.99, "p99"], [0.999, "p99.9"], [0.9999, "p99.99"]];
      const at = ticks.map(([part]) => -Math.log10(1 - part)).filter((value) => value <= high + 1e-9);
      const domain = [at[0], Math.max(high, at[0] + 0.7)], pixels = room / (domain[1] - domain[0]);
      for (let last = at.length - 1; last > 1; last -= 1) if ((at[last] - at[last - 1]) * pixels < 46) at.splice(last - 1, 1);
      return {type: "linear", domain, ticks: at};
    }
    if (axis.scale === "linear") {
      const pad = (high - low || Math.abs(high) || 1) * 0.08;
      const domain = [Math.min(low - pad, 0), Math.max(high + pad, 0)];
      return {type: "linear", domain, ticks: d3.ticks(...domain, Math.max(3, Math.floor(room / 90)))};
    }
    const two = axis.scale === "log2";
    if (!two) { low /= 1.15; high *= 1.15; }
    if (high / low < 4) { const middle = Math.sqrt(low * high); low = middle / 2; high = middle * 2; }
    const powers = two ? d3.range(Math.ceil(Math.log2(low)), Math.floor(Math.log2(high)) + 1).map((power) => 2 ** power)
      : d3.range(Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9) + 1).map((power) => 10 ** power);
    let ticks = powers;
    if (!two && powers.length < 3) {
      ticks = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1)
        .flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)).filter((value) => value >= low && value <= high);
    }
    if (!two && ticks.length < 3) ticks = d3.ticks(low, high, 4);
    const most = Math.max(2, Math.floor(room / 62));
    while (ticks.length > most) ticks = ticks.filter((_, index) => index % 2 === (two ? (ticks.length - 1) % 2 : 0));
    return {type: "log", base: two ? 2 : 10, domain: [low, high], ticks};
  }

  // -- what lies on both kinds of plot
  const halo = {stroke: "var(--back)", strokeWidth: 4, paintOrder: "stroke", fill: "currentColor"};
  function write(svg, kind, text, x, y, anchor) {
    return d3.select(svg).append("text").attr("class", kind).attr("x", x).attr("y", y).attr("text-anchor", anchor)
      .attr("font-size", 12).attr("fill", "currentColor").attr("stroke", "var(--back)").attr("stroke-width", 4)
      .attr("paint-order", "stroke").text(text);
  }
  const stamp = (svg, figure, width) => write(svg, "stamp", figure.stamp, width - 2, 12, "end").attr("font-weight", 700);

  function lines(figure, width) {
    const longest = d3.max(figure.series, (each) => each.label.length);
    const along = figure.labels === "along";
    const right = along ? 16 : Math.min(7.2 * longest + 20, width * 0.36);
    const xs = figure.series.flatMap((each) => each.points.map(([x]) => x)).concat(figure.rules.map(([x]) => x));
    const ys = figure.series.flatMap((each) => each.points.map(([, y]) => y));
    const left = figure.y.format === "percent" ? 48 : 70, height = Math.min(360, Math.max(270, width * 0.62));
    const x = scale(figure.x, xs, width - left - right), y = scale(figure.y, ys, (height - 70) * 2);
    const marks = [Plot.gridX(x.ticks, {stroke: "currentColor", strokeOpacity: 0.12}),
                   Plot.gridY(y.ticks, {stroke: "currentColor", strokeOpacity: 0.12}),
                   Plot.axisX(x.ticks, {text: FORMATS[figure.x.format], label: figure.x.label || null, fontSize: 12, labelArrow: "none", tickSize: 4}),
                   Plot.axisY(y.ticks, {text: FORMATS[figure.y.format], label: null, fontSize: 12, tickSize: 4})];
    for (const [at] of figure.rules) marks.push(Plot.ruleX([at], {stroke: "currentColor", strokeDasharray: "1 3", strokeWidth: 1.5}));
    const tips = [];
    for (const each of figure.series) {
      const {color, symbol, dash} = style(each.style);
      const points = each.points;
      marks.push(Plot.line(points, {stroke: color, strokeDasharray: dash, strokeWidth: 2.2,
                                    curve: along ? "step-after" : "linear", clip: true}));
      const every = along ? [0.25, 0.5, 0.75, 0.9].map((share) => points.find(([, part]) => part >= share)).filter(Boolean)
        : points.filter((_, index) => points.length < 10 || index % 3 === 0);
      marks.push(Plot.dot(every, {stroke: color, fill: "var(--back)", symbol, r: 4.5, strokeWidth: 1.8}));
      tips.push(...points.map(([px, py]) => ({px, py, label: each.label})));
    }
    marks.push(Plot.tip(tips, Plot.pointer({x: "px", y: "py", fill: "var(--raised)", stroke: "var(--quiet)", textPadding: 6,
      title: (each) => `${each.label}\n${FORMATS[figure.x.format](each.px)}, ${FORMATS[figure.y.format](each.py)}`})));
    const {ticks: _, ...xScale} = x, {ticks: __, ...yScale} = y;
    const svg = Plot.plot({width, height, marginLeft: left, marginRight: right, marginTop: 34, marginBottom: figure.x.label ? 42 : 30,
                           x: xScale, y: yScale, marks, style: "overflow: visible"});
    stamp(svg, figure, width);
    ruleWords(svg, figure, {left, right, width, height});
    (along ? alongLabels : endLabels)(svg, figure, {left, right, width, height, domain: x.domain});
    return svg;
  }

  // Points of a curve as it is drawn, four pixels apart or less: what a word would hide.
  function trail(svg, figure, each) {
    const points = each.points.map(([x, y]) => [svg.scale("x").apply(x), svg.scale("y").apply(y)]);
    const corners = figure.labels === "along" ? d3.pairs(points).flatMap(([one, two]) => [one, [two[0], one[1]], two]) : points;
    return d3.pairs(corners).flatMap(([[x1, y1], [x2, y2]]) => {
      const steps = Math.max(1, Math.ceil(Math.hypot(x2 - x1, y2 - y1) / 4));
      return d3.range(steps).map((step) => [x1 + (x2 - x1) * step / steps, y1 + (y2 - y1) * step / steps]);
    });
  }
  const hidden = (trails, {low, high, y}) => d3.sum(trails, (points) =>
    points.filter(([px, py]) => px > low - 4 && px < high + 4 && Math.abs(py - y) < 12).length);
  const covered = (taken, {low, high, y}) => d3.sum(taken, (other) => Math.abs(other.y - y) < 16
    ? Math.max(0, Math.min(high + 4, other.high) - Math.max(low - 4, other.low)) : 0);

  // A word beside each upright line, where it hides least.
  function ruleWords(svg, figure, {left, right, width, height}) {
    const rules = figure.rules.map(([at]) => svg.scale("x").apply(at)), edge = width - right;
    const trails = figure.series.map((each) => trail(svg, figure, each)), taken = [];
    figure.rules.forEach(([, word], index) => {
      const wide = 6.6 * word.length, px = rules[index];
      const places = d3.range(height - 52, 44, -16).flatMap((y, up) => [px + 5, px - 5 - wide].map((low) => {
        const box = {low, high: low + wide, y: y - 4};
        box.cost = up + 8 * (Math.max(0, left + 4 - low) + Math.max(0, low + wide - edge)) + 6 * hidden(trails, box)
          + 20 * covered(taken, box) + 20 * rules.filter((other) => other > low - 3 && other < low + wide + 3).length;
        return box;
      }));
      const box = d3.least(places, (place) => place.cost);
      taken.push(box);
      write(svg, "rule", word, box.low, box.y + 4, "start");
    });
  }

  // Names at the ends of lines, pushed apart, each with a thin line to its own.
  function endLabels(svg, figure, {width, right, height}) {
    const x = svg.scale("x"), y = svg.scale("y"), gap = 15;
    const names = figure.series.map((each) => {
      const [px, py] = each.points[each.points.length - 1];
      return {each, x: x.apply(px), y: y.apply(py), at: y.apply(py)};
    }).sort((one, two) => one.y - two.y);
    names.forEach((name, index) => { name.at = Math.max(name.at, index ? names[index - 1].at + gap : 40); });
    let floor = height - 34;
    for (const name of names.slice().reverse()) { name.at = Math.min(name.at, floor); floor = name.at - gap; }
    const edge = width - right;
    const group = d3.select(svg).append("g").attr("class", "names").attr("font-size", 12).attr("font-family", "inherit");
    for (const {each, x: px, y: py, at} of names) {
      const {color} = style(each.style);
      group.append("path").attr("d", `M${px + 6},${py}L${Math.max(edge + 4, px + 6)},${at}h6`).attr("fill", "none").attr("stroke", color).attr("stroke-opacity", 0.7);
      group.append("text").attr("x", edge + 13).attr("y", at).attr("dy", "0.35em").attr("text-anchor", "start").attr("fill", "currentColor").text(each.label);
    }
  }

  // Names beside curves that all end at the top: each with its filled symbol, where it hides least.
  function alongLabels(svg, figure, {left, width}) {
    const x = svg.scale("x"), y = svg.scale("y");
    const at = (each, share) => x.apply(each.points.find(([, part]) => part >= share)[0]);
    const trails = figure.series.map((each) => trail(svg, figure, each)), taken = [];
    const group = d3.select(svg).append("g").attr("class", "names").attr("font-size", 12).attr("font-family", "inherit");
    for (const each of d3.sort(figure.series, (one) => at(one, 0.5))) {
      const wide = 6.6 * each.label.length + 17, places = [];
      for (const share of [0.5, 0.62, 0.38, 0.8, 0.2, 0.7, 0.3, 0.88, 0.12, 0.06]) {
        for (const [side, away] of [10, 30, 55, 90, 130].flatMap((away) => [[1, away], [-1, away]])) {
          const own = at(each, share), low = own + side * away - (side > 0 ? 0 : wide), box = {own, away, side, low, high: low + wide, y: y.apply(share)};
          if (low < left + 2 || box.high > width - 2) continue;
          const between = (other) => (at(other, share) - own) * side > 0 && (at(other, share) - own) * side < away;
          box.cost = Math.abs(share - 0.5) * 8 + away * 0.12 + 20 * covered(taken, box) + 6 * hidden(trails, box)
            + 15 * figure.series.filter(between).length;
          places.push(box);
        }
      }
      const box = d3.least(places, (place) => place.cost) ?? {own: left + 8, away: 0, side: 1, y: y.apply(0.5), low: left + 8, high: left + 8 + wide};
      taken.push({...box, low: Math.min(box.low, box.own), high: Math.max(box.high, box.own)});
      const {color, symbol} = style(each.style), near = box.side > 0 ? box.low : box.high;
      if (box.away > 10) group.append("path").attr("d", `M${box.own},${box.y}H${near}`).attr("stroke", color).attr("stroke-opacity", 0.7);
      group.append("path").attr("class", "key").attr("d", d3.symbol(d3[`symbol${symbol[0].toUpperCase()}${symbol.slice(1)}`], 52)())
        .attr("transform", `translate(${box.low + 6},${box.y})`).attr("fill", color).attr("stroke", color).attr("stroke-width", 1.5);
      group.append("text").attr("x", box.low + 16).attr("y", box.y).attr("dy", "0.35em").attr("text-anchor", "start")
        .attr("fill", "currentColor").attr("stroke", "var(--back)").attr("stroke-width", 4).attr("paint-order", "stroke").text(each.label);
    }
  }

  function dots(figure, width) {
    const items = figure.items.map((each, index) => ({...each, key: `${index}`}));
    const values = items.flatMap((each) => [each.value, each.low ?? each.value, each.high ?? each.value])
      .concat(figure.rules.map(([value]) => value)).filter((value) => figure.x.scale === "linear" || value > 0);
    const longest = d3.max(items, (each) => each.label.length), room = 7 * longest + 16;
    const narrow = width < 520 || room > width * 0.42, left = narrow ? 12 : room;
    const right = narrow ? 14 : 7.9 * d3.max(items, (each) => each.text.length) + 18;
    // On a phone the words stand above their dot: in one line, or in two where they are too long for that.
    const two = narrow && d3.max(items, (each) => 6.9 * each.label.length + 7.9 * each.text.length) > width - left - right - 8;
    const row = two ? 58 : narrow ? 42 : 25, height = items.length * row + 76;
    const x = scale(figure.x, values, width - left - right);
    const place = {y: "key"};
    const marks = [Plot.gridX(x.ticks, {stroke: "currentColor", strokeOpacity: 0.12}),
                   Plot.axisX(x.ticks, {text: FORMATS[figure.x.format], label: figure.x.label || null, fontSize: 12, labelAnchor: "right", labelArrow: "none", tickSize: 4})];
    for (const [at, word] of figure.rules) {
      marks.push(Plot.ruleX([at], {stroke: "currentColor", strokeWidth: 1.5}));
      marks.push(Plot.text([word], {x: () => at, frameAnchor: "top", dy: -2, lineAnchor: "bottom", text: (text) => text, fontSize: 11, ...halo}));
    }
    for (const each of items) {
      const {color, symbol} = style(each.style);
      if (each.low !== null && each.high !== null && (each.low > 0 || figure.x.scale === "linear")) {
        marks.push(Plot.ruleY([each], {...place, x1: "low", x2: "high", stroke: color, strokeWidth: 3, strokeOpacity: 0.55}));
      }
      marks.push(Plot.dot([each], {...place, x: "value", symbol, stroke: color, fill: color, r: 5.5}));
    }
    const down = two ? -24 : narrow ? -14 : 0, start = narrow ? "start" : "end";
    marks.push(Plot.text(items, {...place, text: "label", frameAnchor: "left", dx: narrow ? 0 : -8, dy: down, textAnchor: start, fontSize: 12.5, ...halo, strokeWidth: 8}));
    marks.push(Plot.text(items, {...place, text: "text", frameAnchor: two ? "left" : "right", dx: narrow ? 0 : 10, dy: two ? -9 : down, textAnchor: two || !narrow ? "start" : "end", fontSize: 12.5, fontWeight: 700, ...halo}));
    const {ticks: _, ...xScale} = x;
    const svg = Plot.plot({width, height, marginLeft: left, marginRight: right, marginTop: 36, marginBottom: 40, x: {...xScale, inset: 8},
                      y: {type: "band", domain: items.map((each) => each.key), axis: null}, marks, style: "overflow: visible"});
    stamp(svg, figure, width);
    return svg;
  }

  function draw(box) {
    const width = Math.floor(box.clientWidth);
    if (width < 50 || box.dataset.width === String(width)) return;  // hidden, or drawn already
    box.dataset.width = String(width);
    const figure = figures[box.dataset.figure];
    const svg = (figure.kind === "lines" ? lines : dots)(figure, width);
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    const about = document.createElementNS("http://www.w3.org/2000/svg", "desc");
    title.textContent = `${figure.title} (${figure.stamp})`;
    about.textContent = `${figure.lead} Shows ${(figure.kind === "lines" ? figure.series : figure.items).map((each) => each.label).join(", ")}. The same figures are in the table below.`;
    title.id = `${figure.id}-svg-title`;
    about.id = `${figure.id}-svg-desc`;
    svg.prepend(title, about);
    for (const mark of svg.querySelectorAll("[aria-label], [aria-description]")) {  // of elements without a role: no reader may use it
      mark.dataset.mark = mark.getAttribute("aria-label") ?? "";
      mark.removeAttribute("aria-label");
      mark.removeAttribute("aria-description");
    }
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-labelledby", title.id);
    svg.setAttribute("aria-describedby", about.id);
    box.replaceChildren(svg);
  }
  const boxes = document.querySelectorAll("[data-figure]");
  const resized = new ResizeObserver((entries) => {
    for (const entry of entries) requestAnimationFrame(() => draw(entry.target));
  });

  // -- places: one at a time
  const places = document.querySelectorAll("[data-place]"), choice = document.querySelector(".places");
  function show(id) {
    for (const place of places) place.hidden = place.dataset.place !== id;
    boxes.forEach(draw);
  }
  if (choice) {
    choice.hidden = false;
    choice.addEventListener("change", (event) => show(event.target.value));
    show(choice.querySelector(":checked").value);
  }
  boxes.forEach((box) => { draw(box); resized.observe(box); });

  // -- tables
  const collator = new Intl.Collator("en", {numeric: true});
  for (const holder of document.querySelectorAll("[data-table]")) {
    const table = holder.querySelector("table"), body = table.tBodies[0], rows = [...body.rows];
    const said = document.createElement("span");
    said.setAttribute("role", "status");
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const name = head.textContent.trim() || "state", button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.sort, text = (row) => row.cells[column].textContent;
        const order = (one, two) => {
          const [a, b] = [key(one), key(two)];
          if (a !== undefined && b !== undefined) return (a - b) * (down ? -1 : 1);
          if (a !== undefined || b !== undefined) return a === undefined ? 1 : -1;  // what was not measured comes last
          return collator.compare(text(one), text(two)) * (down ? -1 : 1);
        };
        body.append(...rows.sort(order));
      });
    });
    if (rows.length < 9) continue;
    holder.querySelector(".scroll").classList.add("tall");
    const bar = document.createElement("div"), label = document.createElement("label"), input = document.createElement("input");
    bar.className = "filter";
    input.type = "search";
    label.append("Filter ", input);
    bar.append(label, said);
    const count = () => { said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`; };
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
      count();
    });
    count();
    holder.prepend(bar);
  }
})();
