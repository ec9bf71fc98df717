(function () {
  "use strict";
  document.documentElement.classList.add("js");
  const byId = (id) => document.getElementById(id);
  const holder = byId("cards");
  const cards = Array.from(document.querySelectorAll(".card"));
  const find = byId("find"), show = byId("show"), tower = byId("tower"), sort = byId("sort");
  cards.forEach((card, i) => { card.dataset.given = i; });

  // numbers: largest first, missing last; text: alphabetical, empty last
  const text = new Set(["name", "near", "text", "place"]);
  function compare(key, rising) {
    return (a, b) => {
      const x = a.dataset[key] || "", y = b.dataset[key] || "";
      if (text.has(key)) {
        if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
        return (rising ? 1 : -1) * x.localeCompare(y) || Number(b.dataset.score || 0) - Number(a.dataset.score || 0);
      }
      const p = parseFloat(x), q = parseFloat(y);
      if (isNaN(p) || isNaN(q)) return (isNaN(p) ? 1 : 0) - (isNaN(q) ? 1 : 0);
      return (rising ? 1 : -1) * (p - q);
    };
  }

  function fits(card) {
    const d = card.dataset;
    const kind = show.value;
    if (kind === "named" && !d.name) return false;
    if (kind === "unnamed" && d.name) return false;
    if (kind === "text" && d.source !== "text") return false;
    if (tower.value && d.tower !== tower.value) return false;
    const asked = find.value.trim().toLowerCase();
    if (!asked) return true;
    const exact = asked.match(/^"(.*)"$/);
    if (exact) return d.name.toLowerCase() === exact[1] || d.name.toLowerCase() === "not " + exact[1];
    return asked.split(/\s+/).every((word) => d.words.toLowerCase().includes(word));
  }

  function update() {
    let shown = 0;
    cards.forEach((card) => {
      const fit = fits(card);
      card.classList.toggle("gone", !fit);
      shown += fit ? 1 : 0;
    });
    byId("count").textContent = shown + " of " + cards.length + " shown";
    byId("nothing").classList.toggle("gone", shown > 0 || cards.length === 0);
    document.querySelectorAll(".chip").forEach((chip) => {
      chip.setAttribute("aria-pressed", String(find.value === '"' + chip.dataset.name + '"'));
    });
  }

  function order() {
    const key = sort.value;
    const rising = key === "given" || key === "index" || key === "name";
    cards.slice().sort(compare(key, rising)).forEach((card) => holder.appendChild(card));
  }

  find.addEventListener("input", update);
  [show, tower].forEach((box) => box.addEventListener("change", update));
  sort.addEventListener("change", order);
  document.querySelector(".toolbar").addEventListener("submit", (event) => event.preventDefault());
  function clear() { find.value = ""; show.value = "all"; tower.value = ""; update(); }
  byId("reset").addEventListener("click", () => { clear(); find.focus(); });
  document.querySelectorAll(".chip:not(:disabled)").forEach((chip) => {
    chip.addEventListener("click", () => {
      const asked = '"' + chip.dataset.name + '"';
      const again = find.value === asked;
      clear();
      find.value = again ? "" : asked;
      update();
      byId("gallery").scrollIntoView();
    });
  });
  // a link to a card that is filtered away shows it again
  document.querySelectorAll('.all a[href^="#f"]').forEach((link) => {
    link.addEventListener("click", () => {
      const card = byId(link.hash.slice(1));
      if (card && card.classList.contains("gone")) clear();
    });
  });

  const body = document.querySelector(".all tbody");
  const rows = Array.from(body.rows);
  document.querySelectorAll(".all th button").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.parentElement, key = button.dataset.key;
      const rising = head.getAttribute("aria-sort") === "none" ? text.has(key) || key === "index"
        : head.getAttribute("aria-sort") === "descending";
      document.querySelectorAll(".all th").forEach((th) => th.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      rows.slice().sort(compare(key, rising)).forEach((row) => body.appendChild(row));
    });
  });
  update();
})();
