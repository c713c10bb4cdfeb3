// Which factors each layer chose, as a map of layers and factors, and the training tasks that choose alike.

const SVG = "http://www.w3.org/2000/svg";
const CELL = 9;
const NAMES = 62;

// What a layer of a decoder is called beside its row: its number, and the projection.
function shortName(layer) {
  const found = /\blayers\.(\d+)\..*?(\w+)$/.exec(layer);
  return found ? `${found[1]} ${found[2]}` : layer.split(".").slice(-2).join(".");
}

// Tasks by the share of a prompt's factors that their samples have in common with it, the nearest first.
export function nearestTasks(routes, { tasks, usage }) {
  const shares = tasks.map((name, task) => {
    const found = Object.entries(usage).flatMap(([layer, ofTasks]) =>
      ofTasks[task].map((ofFactors, pool) => {
        const chosen = routes[layer][pool];
        return chosen.reduce((sum, factor) => sum + ofFactors[factor], 0) / chosen.length;
      }),
    );
    return { name, task, share: found.reduce((sum, share) => sum + share, 0) / found.length };
  });
  return shares.sort((one, other) => other.share - one.share);
}

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// One pool. `usual(layer, factor)`: how often the nearest task chooses it, from 0 to 1.
function map(routes, pool, factors, title, usual) {
  const layers = Object.keys(routes);
  const height = layers.length * CELL;
  const svg = draw("svg", { viewBox: `0 -8 ${NAMES + factors * CELL} ${height + 8}`, role: "img" });
  svg.setAttribute("aria-label", `${title}: ${layers.length} layers, ${factors} factors; the list below tells the same`);
  svg.append(draw("rect", { class: "ground", x: NAMES, y: 0, width: factors * CELL, height }));
  layers.forEach((layer, row) => {
    const chosen = routes[layer][pool];
    svg.append(draw("text", { x: 0, y: row * CELL + 7 }, shortName(layer)));
    for (let factor = 0; factor < factors; factor++) {
      const share = usual(layer, factor);
      const place = { x: NAMES + factor * CELL + 0.5, y: row * CELL + 0.5, width: CELL - 1, height: CELL - 1 };
      if (chosen.includes(factor)) {
        const cell = draw("rect", { ...place, class: "chosen" });
        cell.append(draw("title", {}, `${layer}: factor ${factor}`));
        svg.append(cell);
      } else if (share > 0) {
        svg.append(draw("rect", { ...place, class: "usual", "fill-opacity": share }));
      }
    }
  });
  const step = 4 * Math.ceil(factors / 32);
  for (let factor = 0; factor < factors; factor += step) {
    svg.append(draw("text", { x: NAMES + factor * CELL + 1, y: -2 }, factor));
  }
  const figure = document.createElement("figure");
  figure.className = "map";
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  figure.append(caption, svg);
  return figure;
}

function paragraph(text) {
  const element = document.createElement("p");
  element.className = "note";
  element.textContent = text;
  return element;
}

// What stands beside an answer. `about`: of the model, its `num_factors` and `pairing`; `known`: tasks and usage.
export function routesView(routes, about, known) {
  const view = document.createElement("details");
  view.className = "routes";
  view.open = true;
  const summary = document.createElement("summary");
  summary.textContent = "Factors that each layer chose";
  view.append(summary);
  const near = known?.tasks.length ? nearestTasks(routes, known) : [];
  if (near.length) {
    const told = near.slice(0, 3).map(({ name, share }) => `${name} (${Math.round(100 * share)}%)`);
    const nearest = paragraph(`Nearest training task by route: ${told[0]}; then ${told.slice(1).join(", ")}`);
    nearest.classList.add("nearest");
    view.append(nearest);
  }
  const pools = document.createElement("div");
  pools.className = "pools";
  pools.tabIndex = 0;
  pools.setAttribute("role", "group");
  pools.setAttribute("aria-label", "Maps of the chosen factors");
  const titles = about.pairing === "same" ? ["Pools A and B alike"] : ["Pool A", "Pool B"];
  titles.forEach((title, pool) => {
    const usual = (layer, factor) => (near.length ? known.usage[layer][near[0].task][pool][factor] : 0);
    pools.append(map(routes, pool, about.num_factors, title, usual));
  });
  view.append(pools);
  const also = near.length ? `; paler: the more often samples of ${near[0].name} do, the stronger` : "";
  view.append(paragraph(`Strong: chosen for this answer${also}.`));
  view.append(list(routes, titles));
  return view;
}

function list(routes, titles) {
  const view = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "As a list";
  view.append(summary);
  for (const [layer, pools] of Object.entries(routes)) {
    const told = titles.map((title, pool) => `${titles.length > 1 ? `${title}: ` : ""}${pools[pool].join(", ")}`);
    view.append(paragraph(`${layer}: ${told.join("; ")}`));
  }
  return view;
}
