// The node search finds our nodes by words such as "copyright", in every language of this pack.

import { learn, searched } from "./words.js";

const found = new Map(); // node id -> words, in lower case

/** Give the host's definitions of our nodes the words of their category; newer front ends search them. */
export async function addWords(definitions) {
  await learn();
  for (const definition of Object.values(definitions)) {
    const [top, part] = String(definition.category).split("/");
    if (top !== "AMG" || !part) continue;
    const words = [...new Set([...(definition.search_aliases ?? []), ...searched(part)])];
    definition.search_aliases = words;
    found.set(
      definition.name,
      words.map((word) => word.toLowerCase()),
    );
  }
}

/** The front end's store of nodes, which no version offers to extensions; undefined where it lies elsewhere. */
function store() {
  const root = document.getElementById("vue-app")?.__vue_app__;
  return root?.config.globalProperties.$pinia?._s?.get("nodeDef");
}

/** Older front ends search by names alone: there our nodes come after what they find. */
export function teach() {
  const service = store()?.nodeSearchService;
  const [[name, [word]] = ["", [""]]] = found;
  if (!service?.searchNode || !word || service.searchNode(word).some((node) => node.name === name)) return;
  const kind = Object.getPrototypeOf(service);
  const search = kind.searchNode;
  kind.searchNode = function (query, filters = [], ...more) {
    const before = search.call(this, query, filters, ...more);
    const word = query.trim().toLowerCase();
    if (word.length < 3 || filters.length) return before;
    const ours = [...found].filter(([, words]) => words.some((each) => each.startsWith(word)));
    const nodes = ours.map(([name]) => store().nodeDefsByName[name]);
    return [...before, ...nodes.filter((node) => node && !before.includes(node))];
  };
}
