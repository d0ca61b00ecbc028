// Keys, for pages that work without them: j and k step through items, Enter opens one, / searches, n and p turn pages.

const items = [...document.querySelectorAll("[data-item]")];
let here = -1;

function step(by) {
  if (!items.length) return;
  items[here]?.removeAttribute("data-here");
  here = Math.min(items.length - 1, Math.max(0, here + by));
  const item = items[here];
  item.setAttribute("data-here", "");
  item.querySelector("[data-go]")?.focus({ preventScroll: true });
  item.scrollIntoView({ block: "nearest" });
}

function follow(selector) {
  document.querySelector(selector)?.click();
}

const keys = {
  j: () => step(1),
  k: () => step(-1),
  n: () => follow('a[rel="next"]'),
  p: () => follow('a[rel="prev"]'),
  "/": () => document.querySelector('input[type="search"]')?.focus(),
  "?": () => help(),
};

function help() {
  let told = document.querySelector("dialog.keys");
  if (!told) {
    told = document.createElement("dialog");
    told.className = "keys";
    const list = document.createElement("ul");
    for (const [key, what] of [["j / k", "next / previous item"], ["Enter", "open it"], ["n / p", "next / previous page or neighbour"], ["/", "search"], ["Esc", "close this"]]) {
      const line = document.createElement("li");
      const name = document.createElement("kbd");
      name.textContent = key;
      line.append(name, ` ${what}`);
      list.append(line);
    }
    const title = document.createElement("h2");
    title.textContent = "Keys";
    told.setAttribute("aria-label", "Keys");
    told.append(title, list);
    document.body.append(told);
  }
  told.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.target.closest?.("input, select, textarea, dialog")) {
    if (event.key === "Escape" && !event.target.closest("dialog")) event.target.blur();
    return;
  }
  const act = keys[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
});

// Filters answer at once; the button stays for whoever has no JavaScript.
for (const form of document.querySelectorAll("form.filters")) {
  form.addEventListener("change", (event) => {
    if (event.target.matches("select, input[type='checkbox']")) form.requestSubmit();
  });
  form.addEventListener("formdata", (event) => {
    for (const [name, value] of [...event.formData.entries()]) if (value === "") event.formData.delete(name);
  });
}
