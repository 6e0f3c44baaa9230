// The page and its tabs.
import { all, ask, choose, element, find } from "./common.js";
import { startCompare } from "./compare.js";
import { startDraw } from "./draw.js";
import { startHistory } from "./history.js";
import { startInside } from "./inside.js";

function startTabs() {
  const tabs = all("[role=tab]");
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", event => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = tabs[(to + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  }
}

async function start() {
  startTabs();
  try {
    const about = await ask("/api/about");
    find("#model").textContent = `${about.model} on ${about.device}, kolors_core ${about.version}`;
    find("#controls").append(...about.controls.map(name => element("option", { value: name })));
    find("#adapters").append(...about.adapters.map(name => element("option", { value: name })));
    for (const area of all("textarea[name=prompt]")) area.value = about.prompt;
    const draw = startDraw(about);
    startCompare(about);
    startInside(about);
    startHistory(draw);
    history.replaceState(null, "", location.pathname);  // without the token, which a cookie has now
    document.body.dataset.ready = "true";
  } catch (error) {
    find("#fault").hidden = false;
    find("#fault").textContent = error.message;
  }
}

start();
