(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const nodes = data.nodes, edges = data.edges;
  const QUIET = new Set(["error", "position", "bias", "cls"]);
  const state = { pinned: new Set(), chosen: [], groups: data.supernodes.map((g) => ({ name: g.name, members: new Set(g.members) })), x: 0, y: 0, k: 1, focus: null, moved: false };
  let units = [], lines = [], spots = new Map(), size = { w: 100, h: 100 }, unitOf = [];
  const index = new Map(nodes.map((n, i) => [n.id, i]));

  function el(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }
  function tag(name, attributes, parent, text) {
    const made = document.createElement(name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }
  const signed = (v, d) => (v < 0 ? "−" : "+") + Math.abs(v).toPrecision(d || 3);
  const percent = (v) => (v < 0.0005 ? "< 0.1 %" : (100 * v).toFixed(v < 0.0995 ? 1 : 0) + " %");
  const sign = (v) => (v > 0 ? "up" : v < 0 ? "down" : "");
  const pen = document.createElement("canvas").getContext("2d");
  function width(text, font) { pen.font = font; return pen.measureText(text).width; }
  function short(text, most) { return text.length <= most ? text : text.slice(0, most - 1).trimEnd() + "…"; }

  // ------------------------------------------------------------------ units: what is drawn as one node
  function keyOf(i) {
    const n = nodes[i];
    const group = state.groups.findIndex((g) => g.members.has(n.id));
    if (group >= 0) return "group:" + state.groups[group].name;
    if (n.kind === "feature" && byId("together").checked) return n.tower + ".L" + n.layer + ".F" + n.feature;
    if (n.kind === "error") return n.tower + ".L" + n.layer + ".error";
    if (QUIET.has(n.kind)) return n.tower + "." + n.kind;
    return n.id;
  }
  function makeUnits() {
    const found = new Map();
    unitOf = nodes.map((n, i) => {
      const key = keyOf(i);
      if (!found.has(key)) found.set(key, { key: key, members: [], inf: 0, eff: 0, act: 0, pre: 0, con: 0, rest: 0, row: false, patches: new Map(), places: [] });
      const u = found.get(key);
      u.members.push(i);
      u.inf += n.inf; u.eff += n.eff; u.act += n.act;
      if (n.row) { u.pre += n.pre; u.con += n.con; u.rest += n.rest; u.row = true; }
      if (n.patch && (n.kind === "feature" || n.kind === "patch")) u.patches.set(n.patch.join(), (u.patches.get(n.patch.join()) || 0) + Math.abs(n.act) + (n.kind === "patch" ? 1 : 0));
      else if (n.place) u.places.push(n.place);
      return u;
    });
    units = Array.from(found.values());
    units.forEach((u) => {
      const first = nodes[u.members.reduce((a, b) => (nodes[b].inf > nodes[a].inf ? b : a))];
      u.kind = first.kind; u.tower = first.tower; u.first = first;
      u.layer = first.kind === "output" ? Infinity : ["bias", "position", "cls"].includes(first.kind) ? -1 : first.layer;
      u.quiet = QUIET.has(u.kind);
      u.group = u.key.startsWith("group:") ? u.key.slice(6) : null;
      u.name = u.group || (u.quiet ? { error: "error", position: "positions", bias: u.tower === "projector" ? "projector" : "biases", cls: "class token" }[u.kind] : first.name);
      const where = [];
      if (u.patches.size && u.kind === "feature") where.push(u.patches.size === 1 ? "1 patch" : u.patches.size + " patches");
      where.push(...new Set(u.places));
      const features = new Set(u.members.map((i) => nodes[i].layer + "." + nodes[i].feature)).size;
      const own = u.group ? features + (features === 1 ? " feature" : " features") : u.kind === "feature" && first.name !== "F" + first.feature ? "F" + first.feature : "";
      u.detail = u.kind === "output" ? signed(first.act, 4) : u.kind === "feature" ? [own].concat(where.slice(0, 2)).filter(Boolean).join(", ") : "";
      u.words = u.members.map((i) => nodes[i].id + " " + nodes[i].name + " " + nodes[i].label).join(" ").toLowerCase() + " " + u.name.toLowerCase();
    });
    // edges between units, summed; what runs inside a unit is kept beside it
    const sums = new Map();
    edges.forEach(([s, t, w, score]) => {
      const a = unitOf[s], b = unitOf[t];
      if (a === b) { a.rest += w; return; }
      const key = a.key + "\n" + b.key;
      if (!sums.has(key)) sums.set(key, { a: a, b: b, w: 0, score: 0 });
      const line = sums.get(key);
      line.w += w; line.score += score;
    });
    lines = Array.from(sums.values()).sort((p, q) => q.score - p.score);
    units.forEach((u) => { u.into = []; u.out = []; });
    lines.forEach((l) => { l.a.out.push(l); l.b.into.push(l); });
  }

  // ------------------------------------------------------------------ what is shown
  function share(sorted, value, part) {
    const total = sorted.reduce((sum, x) => sum + value(x), 0);
    let sum = 0, n = 0;
    while (n < sorted.length && sum < part * total - 1e-12) sum += value(sorted[n++]);
    return sorted.slice(0, n);
  }
  function isPinned(u) { return u.members.some((i) => state.pinned.has(i)); }
  function choose() {
    const part = byId("nodes").value / 100, flow = byId("edges").value / 100;
    const free = units.filter((u) => u.kind === "feature").sort((a, b) => b.inf - a.inf);
    const kept = new Set(part >= 1 ? free : share(free, (u) => u.inf, part));
    const patches = units.filter((u) => u.kind === "patch").sort((a, b) => b.inf - a.inf).slice(0, 12);
    units.forEach((u) => {
      u.shown = u.kind === "output" || u.kind === "token" || kept.has(u) || isPinned(u) || (u.quiet && byId("quiet").checked && u.inf > 0.001) || patches.includes(u) || state.chosen.includes(u.key);
    });
    const open = lines.filter((l) => l.a.shown && l.b.shown);
    const drawn = new Set(flow >= 1 ? open : share(open, (l) => l.score, flow));
    state.chosen.forEach((key) => ["a", "b"].forEach((end) => open.filter((l) => l[end].key === key).slice(0, 16).forEach((l) => drawn.add(l))));
    lines.forEach((l) => { l.shown = drawn.has(l); });
    const shown = free.filter((u) => u.shown).length;
    byId("count").textContent = shown + " of " + free.length + " features, " + drawn.size + " of " + lines.length + " edges";
    byId("nodes-said").textContent = Math.round(100 * part) + " %";
    byId("edges-said").textContent = Math.round(100 * flow) + " %";
  }

  // ------------------------------------------------------------------ places
  const GUTTER = 96, GAP = 10, ROW = 56, LINE = 14;
  let WIDE = 1400;
  function measure(u) {
    if (u.quiet || u.kind === "token" || u.kind === "patch") { u.w = width(label(u), "12.5px system-ui, sans-serif") + 22; u.h = 24; return; }
    const a = width(short(u.name, longest(u)), "650 12.5px system-ui, sans-serif"), b = width(short(u.detail, 36), "10.5px system-ui, sans-serif");
    u.w = Math.max(a, b) + 26; u.h = 40;
  }
  function longest(u) { return u.kind === "output" ? 46 : 30; }
  function label(u) { return u.kind === "patch" ? u.first.patch ? "patch " + u.first.patch.join(",") : u.name : short(u.name, 18); }
  const words = (members) => members.every((u) => u.kind === "token");
  function wrapped(members, room) {
    const found = [[]];
    let used = 0;
    members.forEach((u) => {
      if (found[found.length - 1].length && used + u.w > room) { found.push([]); used = 0; }
      found[found.length - 1].push(u);
      used += u.w + GAP;
    });
    return found;
  }
  // as many lines as boxes need whatever their order: dealt to the shortest line, none is longer than mean + widest
  function linesFor(members, room) {
    if (words(members)) return wrapped(members, room).length;
    const total = members.reduce((sum, u) => sum + u.w + GAP, 0), widest = Math.max(...members.map((u) => u.w + GAP));
    let n = 1;
    while (total / n + widest * (1 - 1 / n) > room && n < members.length) n++;
    return n;
  }
  // the width of page at which everything is largest on this screen
  function layout() {
    const box = byId("stage").getBoundingClientRect();
    let best = null, most = 0;
    [0.8, 1, 1.25, 1.6, 2.1].forEach((part) => {
      const wide = Math.max(560, box.width * part);
      arrange(wide);
      const k = Math.min(1.4, box.width / size.w, box.height / size.h);
      if (k > most * 1.02) { most = k; best = wide; }
    });
    return arrange(best || 1000);
  }
  function arrange(wide) {
    WIDE = wide;
    const shown = units.filter((u) => u.shown);
    shown.forEach(measure);
    const solid = new Set(["feature", "patch", "token"]);
    const own = data.towers.filter((t) => units.some((u) => u.tower === t && solid.has(u.kind)));
    const home = new Map(data.towers.map((t) => [t, own.includes(t) ? t : (data.feeds.find(([a, b]) => a === t && own.includes(b)) || [t, own[0]])[1]]));
    const depth = new Map();
    own.forEach((t) => depth.set(t, Math.max(0, ...data.feeds.filter(([a, b]) => b === t && a !== t && depth.has(a)).map(([a]) => depth.get(a) + 1))));
    const outputs = shown.filter((u) => u.kind === "output");
    const rows = []; // from the top down
    let y = 0;
    spots = new Map();
    function addRow(name, members, left, right, top) {
      const n = linesFor(members, right - left - GUTTER - 8), tall = Math.max(...members.map((u) => u.h));
      rows.push({ name: name, members: members, left: left, right: right, top: top, n: n, tall: tall, height: n * tall + (n - 1) * LINE });
      return top + n * tall + (n - 1) * LINE;
    }
    if (outputs.length) y = addRow("output", outputs, 0, WIDE, 0) + ROW;
    const most = Math.max(0, ...depth.values());
    for (let d = most; d >= 0; d--) {
      const level = own.filter((t) => depth.get(t) === d && shown.some((u) => home.get(u.tower) === t));
      const mine = level.map((t) => shown.filter((u) => home.get(u.tower) === t && u.kind !== "output"));
      const need = mine.map((m) => Math.sqrt(Math.max(1, m.filter((u) => u.layer >= 0).reduce((s, u) => s + u.w + GAP, 0))));
      const least = GUTTER + 190, spare = WIDE - least * level.length, all = need.reduce((a, b) => a + b, 0);
      const stacks = level.map((t, c) => Array.from(new Set(mine[c].map((u) => u.layer))).sort((a, b) => b - a));
      let left = 0, bottom = y;
      const plans = level.map((t, c) => {
        const right = left + least + Math.max(0, spare) * need[c] / all, start = rows.length;
        let at = y;
        stacks[c].forEach((layer) => {
          at = addRow(t + (layer < 0 ? " input" : " L" + layer), mine[c].filter((u) => u.layer === layer), left, right - 14, at) + ROW;
        });
        left = right; bottom = Math.max(bottom, at);
        return { start: start, end: rows.length, at: at };
      });
      plans.forEach((p) => { for (let r = p.start; r < p.end; r++) rows[r].top += bottom - p.at; }); // stand on one ground
      y = bottom;
    }
    size = { w: WIDE, h: y - ROW };
    place(rows);
    return rows;
  }
  function place(rows) {
    rows.forEach((row) => row.members.forEach((u, i) => {
      let part = (i + 0.5) / row.members.length;
      if (u.patches.size && data.grid) {
        let sum = 0, all = 0;
        u.patches.forEach((v, key) => { const c = Number(key.split(",")[1]); sum += (c + 0.5) * v; all += v; });
        if (all) part = sum / all / data.grid[1];
      }
      u.x = row.left + GUTTER + part * (row.right - row.left - GUTTER);
    }));
    const near = new Map(units.map((u) => [u, []]));
    lines.forEach((l) => { if (l.a.shown && l.b.shown) { near.get(l.a).push([l.b, l.score]); near.get(l.b).push([l.a, l.score]); } });
    for (let sweep = 0; sweep < 6; sweep++) {
      (sweep % 2 ? rows : rows.slice().reverse()).forEach((row) => {
        const wish = new Map(row.members.map((u, i) => {
          const all = near.get(u).reduce((s, [, w]) => s + w, 0);
          const mean = all ? near.get(u).reduce((s, [v, w]) => s + v.x * w, 0) / all : u.x;
          return [u, 0.6 * mean + 0.4 * u.x];
        }));
        if (words(row.members)) {
          const low = row.left + GUTTER, high = row.right - 8, found = wrapped(row.members, high - low);
          const long = Math.max(...found.map((line) => line.reduce((s, u) => s + u.w + GAP, 0)));
          const middle = Array.from(wish.values()).reduce((a, b) => a + b, 0) / wish.size;
          const start = Math.min(Math.max(low, middle - long / 2), Math.max(low, high - long));
          found.forEach((line, n) => {
            let at = start;
            line.forEach((u) => { u.x = at + u.w / 2; at += u.w + GAP; u.y = row.top + row.tall / 2 + n * (row.tall + LINE); });
          });
          return;
        }
        const order = row.members.slice().sort((a, b) => wish.get(a) - wish.get(b));
        const dealt = Array.from({ length: row.n }, () => []), used = new Array(row.n).fill(0);
        order.forEach((u) => { const least = used.indexOf(Math.min(...used)); dealt[least].push(u); used[least] += u.w + GAP; });
        for (let n = 0; n < row.n; n++) {
          const line = dealt[n];
          let at = row.left + GUTTER, limit = row.right - 8;
          line.forEach((u) => { u.x = Math.max(wish.get(u), at + u.w / 2); at = u.x + u.w / 2 + GAP; });
          line.reverse().forEach((u) => { u.x = Math.min(u.x, limit - u.w / 2); limit = u.x - u.w / 2 - GAP; u.y = row.top + row.tall / 2 + n * (row.tall + LINE); });
        }
      });
    }
    rows.forEach((row) => row.members.forEach((u) => spots.set(u.key, u)));
  }

  // ------------------------------------------------------------------ drawing
  function clear(parent) { while (parent.firstChild) parent.removeChild(parent.firstChild); }
  function ports(list, end, other) {
    list.sort((p, q) => p[other].x - q[other].x);
    const span = Math.min(list[0][end].w - 14, 8 * (list.length - 1));
    list.forEach((l, i) => { l[end === "a" ? "xa" : "xb"] = l[end].x + (list.length > 1 ? (i / (list.length - 1) - 0.5) * span : 0); });
  }
  function draw() {
    choose();
    const rows = layout();
    ["bands", "links", "boxes"].forEach((id) => clear(byId(id)));
    rows.forEach((row) => {
      el("rect", { class: "band", x: row.left - 6, y: row.top - 8, width: row.right - row.left + 6, height: row.height + 16, rx: 8 }, byId("bands"));
      el("text", { class: "row-name", x: row.left + 4, y: row.top + row.height / 2 + 4 }, byId("bands"), row.name);
    });
    const visible = lines.filter((l) => l.shown);
    units.forEach((u) => {
      const out = visible.filter((l) => l.a === u), into = visible.filter((l) => l.b === u);
      if (out.length) ports(out, "a", "b");
      if (into.length) ports(into, "b", "a");
    });
    const strongest = Math.max(1e-12, ...visible.map((l) => l.score));
    visible.slice().reverse().forEach((l) => {
      const y0 = l.a.y - l.a.h / 2, y1 = l.b.y + l.b.h / 2, bend = Math.max(24, 0.42 * Math.abs(y0 - y1)), part = l.score / strongest;
      l.path = el("path", { class: "link " + sign(l.w), d: `M${l.xa},${y0}C${l.xa},${y0 - bend} ${l.xb},${y1 + bend} ${l.xb},${y1}`, "stroke-width": (0.5 + 4.8 * Math.pow(part, 0.6)).toFixed(2), "stroke-opacity": (0.22 + 0.5 * Math.pow(part, 0.4)).toFixed(2) }, byId("links"));
    });
    const largest = Math.max(1e-12, ...units.filter((u) => u.kind === "feature").map((u) => u.inf));
    rows.forEach((row) => row.members.slice().sort((a, b) => a.x - b.x).forEach((u) => drawUnit(u, largest)));
    if (state.focus === null || !spots.has(state.focus)) state.focus = (rows[0] && rows[0].members[0] || { key: null }).key;
    mark();
    listGroups();
    byId("group").disabled = state.chosen.length < 1 || !state.chosen.every((k) => spots.has(k) && spots.get(k).kind === "feature");
  }
  function drawUnit(u, largest) {
    const kind = u.kind === "output" ? " output" : u.quiet ? " quiet" : " " + sign(u.eff);
    const g = el("g", { class: "node" + kind, transform: `translate(${u.x},${u.y})`, role: "button", tabindex: -1, "data-key": u.key, "aria-label": `${u.name}, ${u.kind}, ${u.tower}${isFinite(u.layer) && u.layer >= 0 ? " layer " + u.layer : ""}, ${percent(u.inf)} of influence` }, byId("boxes"));
    el("rect", { class: "frame", x: -u.w / 2, y: -u.h / 2, width: u.w, height: u.h, rx: 5 }, g);
    if (u.h < 30) el("text", { class: "name", x: 0, y: 4, "text-anchor": "middle" }, g, label(u));
    else {
      el("text", { class: "name", x: -u.w / 2 + 9, y: u.detail ? -3 : 4 }, g, short(u.name, longest(u)));
      if (u.detail) el("text", { class: "detail", x: -u.w / 2 + 9, y: 12 }, g, short(u.detail, 36));
    }
    if (u.kind === "feature") el("rect", { class: "bar", x: -u.w / 2 + 5, y: u.h / 2 - 3, width: ((u.w - 10) * Math.min(1, u.inf / largest)).toFixed(1), height: 3 }, g);
    el("text", { class: "pin", x: u.w / 2 - 14, y: -u.h / 2 + 12 }, g, "📌");
    el("title", {}, g, u.name + (u.detail ? " (" + u.detail + ")" : ""));
    g.addEventListener("click", (event) => { if (!state.moved) select(u.key, event.shiftKey || event.ctrlKey || event.metaKey); });
    g.addEventListener("pointerenter", () => light(u));
    g.addEventListener("pointerleave", () => light(null));
    g.addEventListener("focus", () => { state.focus = u.key; light(u); });
    u.g = g;
  }
  function mark() {
    const asked = byId("find").value.trim().toLowerCase();
    const words = asked.split(/\s+/).filter(Boolean);
    const first = state.chosen.length ? units.filter((u) => state.chosen.includes(u.key)) : [];
    const near = new Set(first);
    lines.forEach((l) => { if (l.shown && first.some((u) => l.a === u || l.b === u)) { near.add(l.a); near.add(l.b); } });
    units.filter((u) => u.shown && u.g).forEach((u) => {
      const fits = words.length > 0 && words.every((w) => u.words.includes(w));
      u.g.classList.toggle("found", fits);
      u.g.classList.toggle("chosen", state.chosen.includes(u.key));
      u.g.classList.toggle("pinned", isPinned(u));
      u.g.classList.toggle("dim", (words.length > 0 && !fits) || (first.length > 0 && !near.has(u)));
      u.g.setAttribute("tabindex", u.key === state.focus ? 0 : -1);
      u.g.setAttribute("aria-pressed", String(state.chosen.includes(u.key)));
    });
    lines.forEach((l) => { if (l.shown && l.path) l.path.classList.toggle("dim", first.length > 0 && !first.includes(l.a) && !first.includes(l.b)); });
  }

  // ------------------------------------------------------------------ the image
  const rects = new Map();
  function drawPatches() {
    if (!data.grid || !byId("patches")) return;
    const found = nodes.filter((n) => n.kind === "patch" && n.patch);
    const top = new Set(found.slice().sort((a, b) => b.inf - a.inf).slice(0, 8));
    const most = Math.max(1e-12, ...found.map((n) => Math.abs(n.eff)));
    found.forEach((n) => {
      const colour = n.eff > 0 ? "#c2410c" : "#1f5fa8";
      const rect = el("rect", { x: n.patch[1] * 32 + 0.5, y: n.patch[0] * 32 + 0.5, width: 31, height: 31, fill: colour, stroke: colour, tabindex: -1 }, byId("patches"));
      rect.style.fillOpacity = 0.6 * Math.abs(n.eff) / most;
      rect.classList.toggle("top", top.has(n));
      el("title", {}, rect, `${n.label}: total effect ${signed(n.eff)}, ${percent(n.inf)} of influence`);
      rect.addEventListener("click", () => select(n.id, false));
      rect.addEventListener("pointerenter", () => byPlace(n.patch.join()));
      rect.addEventListener("pointerleave", () => byPlace(null));
      rects.set(n.patch.join(), { rect: rect, calm: 0.6 * Math.abs(n.eff) / most, colour: colour });
    });
  }
  function light(u) {
    const said = byId("image-said");
    const most = u ? Math.max(1e-12, ...u.patches.values()) : 1;
    rects.forEach((r, key) => {
      const value = u && u.patches.get(key);
      r.rect.classList.toggle("hot", Boolean(value));
      r.rect.setAttribute("fill", value ? "#ffb300" : r.colour);
      r.rect.style.fillOpacity = u && u.patches.size ? (value ? 0.2 + 0.45 * value / most : 0) : r.calm;
    });
    if (said) said.textContent = u && u.patches.size ? `${u.name}: ${u.kind === "feature" ? "fires at" : ""} ${u.patches.size} ${u.patches.size === 1 ? "patch" : "patches"}` : "Colour: what each patch does to the output in total. Point at a node to see where it fires.";
  }
  function byPlace(key) {
    units.filter((u) => u.shown && u.g).forEach((u) => u.g.classList.toggle("found", key !== null && u.patches.has(key)));
    if (key === null) mark();
  }

  // ------------------------------------------------------------------ details of what is chosen
  function row(table, name, value, kind) {
    const tr = tag("tr", kind ? { class: kind } : {}, table);
    tag("th", { scope: "row" }, tr, name);
    tag("td", {}, tr, value);
  }
  function edgeTable(parent, title, list, end) {
    if (!list.length) return;
    tag("h2", {}, parent, `${title} (${list.length})`);
    const table = tag("table", { class: "edges" }, parent);
    const sorted = list.slice().sort((p, q) => Math.abs(q.w) - Math.abs(p.w));
    const most = Math.abs(sorted[0].w) || 1;
    sorted.slice(0, 14).forEach((l) => {
      const tr = tag("tr", {}, table), other = l[end];
      const button = tag("button", { type: "button" }, tag("td", {}, tr), (other.quiet ? other.tower + (other.layer >= 0 ? " L" + other.layer : "") + " " : "") + (other.kind === "patch" ? label(other) : other.name));
      button.addEventListener("click", () => select(other.key, false));
      tag("td", { class: "w" }, tr, signed(l.w));
      const bar = el("svg", { width: 58, height: 8, "aria-hidden": "true" }, tag("td", { class: "b" }, tr));
      el("rect", { x: 0, y: 1, height: 6, width: (58 * Math.abs(l.w) / most).toFixed(1), fill: l.w > 0 ? "#c2410c" : "#1f5fa8" }, bar);
    });
    if (sorted.length > 14) tag("p", { class: "soft" }, parent, `and ${sorted.length - 14} weaker, together ${signed(sorted.slice(14).reduce((s, l) => s + l.w, 0))}`);
  }
  function details() {
    const panel = byId("details");
    clear(panel);
    const chosen = state.chosen.map((key) => units.find((u) => u.key === key)).filter(Boolean);
    if (!chosen.length) {
      tag("p", { class: "soft" }, panel, "Click a node, or move to one with the arrow keys and press Enter, to see what it is, what feeds it and what it feeds.");
      return;
    }
    if (chosen.length > 1) tag("p", { class: "soft" }, panel, chosen.length + " selected; the last one:");
    const u = chosen[chosen.length - 1], one = u.members.length === 1;
    tag("h3", {}, panel, u.name);
    tag("p", { class: "mono" }, panel, one ? u.first.id : u.members.slice(0, 6).map((i) => nodes[i].id).join(", ") + (u.members.length > 6 ? ` and ${u.members.length - 6} more` : ""));
    const buttons = tag("p", { class: "buttons" }, panel);
    const pin = tag("button", { type: "button", id: "pin", "aria-pressed": String(isPinned(u)) }, buttons, isPinned(u) ? "Unpin" : "Pin");
    pin.addEventListener("click", () => togglePin(u));
    const table = tag("table", { class: "kv" }, panel);
    row(table, "kind", u.kind + (one ? "" : `, ${u.members.length} places`));
    row(table, "tower, layer", u.tower + (isFinite(u.layer) && u.layer >= 0 ? ", " + u.layer : ""));
    if (u.kind === "feature") row(table, one ? "activation" : "activation, summed", u.act.toPrecision(4));
    row(table, "influence", percent(u.inf));
    if (u.kind !== "output") row(table, "total effect on output", signed(u.eff));
    if (u.row) {
      const into = u.into.reduce((s, l) => s + l.w, 0);
      row(table, "edges in this graph", signed(into, 5));
      row(table, "edges left out", signed(u.rest, 5));
      row(table, "constant", signed(u.con, 5));
      row(table, u.kind === "output" ? "= value" : "= pre-activation", signed(into + u.rest + u.con, 5), "sum");
      row(table, "in the model", signed(u.pre, 5));
    } else if (u.kind === "feature") row(table, "in-edges", "not computed");
    const strip = data.gallery[u.first.key];
    if (strip && u.kind === "feature") {
      tag("h2", {}, panel, "Where it fires most");
      const shots = tag("div", { class: "shots" }, panel);
      strip.forEach((shot) => {
        const figure = tag("figure", {}, shots);
        tag("img", { src: shot.src, alt: shot.caption, title: shot.caption }, figure);
        tag("figcaption", {}, figure, shot.caption);
      });
    }
    edgeTable(panel, "Fed by", u.into, "a");
    edgeTable(panel, "Feeds", u.out, "b");
  }

  // ------------------------------------------------------------------ actions
  function select(key, more) {
    if (!units.some((u) => u.key === key)) return;
    const has = state.chosen.includes(key);
    state.chosen = more ? (has ? state.chosen.filter((k) => k !== key) : state.chosen.concat(key)) : has && state.chosen.length === 1 ? [] : [key];
    state.focus = key;
    draw(); details();
    focusNode(key);
  }
  function focusNode(key) {
    const u = spots.get(key);
    if (u && u.g) u.g.focus({ preventScroll: true });
  }
  // pins belong to the graph's nodes, so that they stay when these are drawn together, apart, or as a group
  function togglePin(u) {
    const was = isPinned(u);
    u.members.forEach((i) => { if (was) state.pinned.delete(i); else state.pinned.add(i); });
    draw(); details();
  }
  function askName() {
    if (byId("group").disabled) return;
    byId("naming").classList.remove("gone");
    byId("name").value = units.find((u) => u.key === state.chosen[0]).name;
    byId("name").focus();
    byId("name").select();
  }
  function makeGroup(name) {
    let free = name.trim() || "group";
    for (let n = 2; state.groups.some((g) => g.name === free); n++) free = name.trim() + " " + n;
    const members = new Set(units.filter((u) => state.chosen.includes(u.key)).flatMap((u) => u.members.map((i) => nodes[i].id)));
    state.groups.forEach((g) => members.forEach((m) => g.members.delete(m)));
    state.groups = state.groups.filter((g) => g.members.size);
    state.groups.push({ name: free, members: members });
    state.chosen = ["group:" + free];
    makeUnits(); draw(); details();
  }
  function listGroups() {
    const list = byId("groups");
    if (list.contains(document.activeElement)) return;
    clear(list);
    state.groups.forEach((g) => {
      const item = tag("li", {}, list);
      const name = tag("input", { type: "text", "aria-label": "Name of group", value: g.name }, item);
      name.addEventListener("change", () => {
        const text = name.value.trim();
        if (!text || state.groups.some((h) => h !== g && h.name === text)) { name.value = g.name; return; }
        state.chosen = state.chosen.map((k) => (k === "group:" + g.name ? "group:" + text : k));
        g.name = text; name.blur(); makeUnits(); draw(); details();
      });
      tag("span", { class: "soft" }, item, String(g.members.size));
      const drop = tag("button", { type: "button", "aria-label": "Dissolve " + g.name }, item, "×");
      drop.addEventListener("click", () => { drop.blur(); state.groups = state.groups.filter((h) => h !== g); state.chosen = []; makeUnits(); draw(); details(); });
    });
    if (!state.groups.length) tag("li", { class: "soft" }, list, "none yet");
  }

  // ------------------------------------------------------------------ pan, zoom, keys
  function move() { byId("world").setAttribute("transform", `translate(${state.x},${state.y}) scale(${state.k})`); }
  function fit() {
    const box = byId("stage").getBoundingClientRect();
    state.k = Math.max(0.15, Math.min(1.4, (box.width - 28) / size.w, (box.height - 36) / Math.max(1, size.h)));
    state.x = (box.width - size.w * state.k) / 2; state.y = Math.max(16, (box.height - size.h * state.k) / 2);
    move();
  }
  function zoom(factor, x, y) {
    const k = Math.max(0.1, Math.min(6, state.k * factor)), box = byId("stage").getBoundingClientRect();
    const px = x === undefined ? box.width / 2 : x - box.left, py = y === undefined ? box.height / 2 : y - box.top;
    state.x = px - (px - state.x) * k / state.k; state.y = py - (py - state.y) * k / state.k; state.k = k;
    move();
  }
  const graph = byId("graph");
  graph.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY * 0.0015), event.clientX, event.clientY); }, { passive: false });
  let from = null;
  graph.addEventListener("pointerdown", (event) => { from = { x: event.clientX - state.x, y: event.clientY - state.y, cx: event.clientX, cy: event.clientY }; state.moved = false; });
  window.addEventListener("pointermove", (event) => {
    if (!from) return;
    if (Math.hypot(event.clientX - from.cx, event.clientY - from.cy) > 4) { state.moved = true; graph.classList.add("dragging"); }
    if (state.moved) { state.x = event.clientX - from.x; state.y = event.clientY - from.y; move(); }
  });
  window.addEventListener("pointerup", () => { from = null; graph.classList.remove("dragging"); });
  graph.addEventListener("click", (event) => { if (!state.moved && !event.target.closest(".node")) { state.chosen = []; draw(); details(); } });

  function neighbour(u, key) {
    if (key === "ArrowUp" || key === "ArrowDown") {
      const list = lines.filter((l) => l.shown && (key === "ArrowUp" ? l.a === u : l.b === u));
      return list.length ? (key === "ArrowUp" ? list[0].b : list[0].a) : null;
    }
    const row = units.filter((v) => v.shown && Math.abs(v.y - u.y) < 1).sort((a, b) => a.x - b.x);
    return row[row.indexOf(u) + (key === "ArrowRight" ? 1 : -1)] || null;
  }
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input[type=search], input[type=text], textarea");
    if (event.key === "Escape") {
      byId("find").value = ""; state.chosen = []; byId("naming").classList.add("gone"); draw(); details(); return;
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); byId("find").focus(); return; }
    if (event.target.matches("input")) return; // sliders keep their arrows
    if (event.key === "+" || event.key === "=") return zoom(1.25);
    if (event.key === "-") return zoom(0.8);
    if (event.key === "0") return fit();
    if (event.key === "g" || event.key === "G") { event.preventDefault(); return askName(); }
    const u = spots.get(state.focus);
    const onNode = event.target.closest && event.target.closest(".node");
    if (!u || !onNode) return;
    if (event.key === "p" || event.key === "P") { togglePin(u); focusNode(u.key); return; }
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(u.key, event.shiftKey); return; }
    if (event.key.startsWith("Arrow")) {
      event.preventDefault();
      const next = neighbour(u, event.key);
      if (next) { state.focus = next.key; mark(); focusNode(next.key); reveal(next); }
    }
  });
  function reveal(u) {
    const box = byId("stage").getBoundingClientRect(), x = u.x * state.k + state.x, y = u.y * state.k + state.y;
    if (x < 40 || x > box.width - 40) state.x += box.width / 2 - x;
    if (y < 40 || y > box.height - 40) state.y += box.height / 2 - y;
    move();
  }
  byId("find").addEventListener("input", mark);
  byId("toolbar").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = byId("find").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const hit = words.length && units.filter((u) => words.every((w) => u.words.includes(w))).sort((a, b) => b.inf - a.inf)[0];
    if (hit) { byId("find").value = ""; state.chosen = []; select(hit.key, false); reveal(hit); }
  });
  ["nodes", "edges"].forEach((id) => byId(id).addEventListener("input", draw));
  byId("nodes").addEventListener("change", fit);
  byId("together").addEventListener("change", () => { state.chosen = []; makeUnits(); draw(); details(); fit(); });
  byId("quiet").addEventListener("change", () => { draw(); fit(); });
  byId("closer").addEventListener("click", () => zoom(1.25));
  byId("farther").addEventListener("click", () => zoom(0.8));
  byId("fit").addEventListener("click", fit);
  byId("group").addEventListener("click", askName);
  byId("naming").addEventListener("submit", (event) => { event.preventDefault(); byId("naming").classList.add("gone"); makeGroup(byId("name").value); });
  byId("export").addEventListener("click", () => {
    byId("json").value = JSON.stringify({ schema_version: 1, supernodes: state.groups.map((g) => ({ name: g.name, members: Array.from(g.members) })) }, null, 2);
    byId("json-label").classList.remove("gone");
    byId("json").focus(); byId("json").select();
  });
  window.addEventListener("resize", fit);
  makeUnits(); drawPatches(); draw(); details(); fit();
})();
