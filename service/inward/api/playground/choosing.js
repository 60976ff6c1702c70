// Which head, among those that will do.
import { h } from "./dom.js";

export function headSelect(listed, kinds) {
  const fit = kinds.flatMap((kind) => listed.filter((head) => head.kind === kind));
  return h("select", {}, fit.map((head) => h("option", { value: head.name }, `${head.name} (${head.kind})`)));
}
