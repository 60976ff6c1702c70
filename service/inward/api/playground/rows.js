// The pair in a row, as `inward annotate` reads it: a prompt with its whole context, and two answers to it. Layouts that this page does not
// read are refused by name, because a part of them would be another conversation.

const ROLES = { human: "user", gpt: "assistant", system: "system", developer: "developer", user: "user", assistant: "assistant", tool: "tool" };
const SPEAKERS = { Human: "user", Assistant: "assistant" };
const UNCARRIED = ["tools", "images", "image", "videos", "audios"];
const given = (value) => value !== undefined && value !== null && (value.length === undefined || value.length > 0);
const ELSEWHERE = "`inward annotate` reads more layouts than this page";

function messages(value, column) {
  if (!Array.isArray(value) || !value.length) throw new Error(`${column} must be text, or a list of {role, content} messages; ${ELSEWHERE}`);
  return value.map((turn, i) => {
    const role = ROLES[turn?.role ?? turn?.from];
    const content = turn?.role ? turn.content : turn?.value;
    if (!role || typeof content !== "string" || given(turn.tool_calls)) {
      throw new Error(`${column}, message ${i + 1}, is no {role, content} of texts; ${ELSEWHERE}`);
    }
    return { role, content };
  });
}

const isTranscript = (value) => typeof value === "string" && value.trimStart().startsWith("Human:") && value.replaceAll("\r\n", "\n").includes("\n\nAssistant:");

function transcript(said, column) {
  const parts = said.replaceAll("\r\n", "\n").split(/(?:^|\n\n)(Human|Assistant):[ \t]?/);
  if (parts[0].trim() || parts.length < 3) throw new Error(`${column}: a transcript must begin with 'Human:' or 'Assistant:'`);
  const turns = [];
  for (let i = 1; i < parts.length; i += 2) turns.push({ role: SPEAKERS[parts[i]], content: parts[i + 1].trim() });
  return turns.at(-1).content ? turns : turns.slice(0, -1);
}

// What stands before an answer, and the answer.
function answer(value, column) {
  if (typeof value === "string") return [[], value];
  const turns = messages(value, column);
  const last = turns.pop();
  if (last.role !== "assistant") throw new Error(`${column} must end with the assistant's turn: it is what is compared`);
  return [turns, last.content];
}

const asTurns = (prompt) => (typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt);
const same = (some, others) => some.length === others.length
  && some.every((one, i) => one.role === others[i].role && one.content.trim() === others[i].content.trim());

function context(prompt, before, column) {
  if (!before.length) return prompt;
  if (prompt === null || (typeof prompt === "string" && !prompt.trim())) return before;
  if (same(asTurns(prompt), before)) return prompt;
  throw new Error(`${column} holds another conversation than the prompt; ${ELSEWHERE}`);
}

// {prompt, chosen, rejected} of texts (the prompt may be messages); throws what is wrong with the row.
export function read(row) {
  if (row === null || typeof row !== "object" || Array.isArray(row)) throw new Error("is no object with prompt, chosen and rejected");
  const carried = UNCARRIED.find((name) => given(row[name]));
  if (carried) throw new Error(`${carried} is context which a prompt of text can't carry`);
  const asked = row.prompt ?? row.messages ?? null;
  const spoken = isTranscript(row.prompt || row.chosen);
  let prompt = asked === null || typeof asked === "string" ? asked : messages(asked, "prompt");
  if (spoken && typeof prompt === "string") prompt = transcript(prompt, "prompt");
  const [[chosenAfter, chosen], [rejectedAfter, rejected]] = ["chosen", "rejected"].map((column) => {
    const value = row[column];
    if (value === undefined || value === null) throw new Error(`${column} is missing; ${ELSEWHERE}`);
    const plain = typeof value !== "string" || !spoken || (prompt !== null && !isTranscript(value));
    return answer(plain ? value : transcript(value, column), column);
  });
  const both = [context(prompt, chosenAfter, "chosen"), context(prompt, rejectedAfter, "rejected")];
  if (both.includes(null)) throw new Error(`prompt is missing; ${ELSEWHERE}`);
  if (!same(...both.map(asTurns))) throw new Error("chosen and rejected answer different prompts");
  return { prompt: withSystem(row.system, both[0]), chosen, rejected };
}

function withSystem(system, prompt) {
  if (!given(system)) return prompt;
  const turns = asTurns(prompt);
  if (turns[0].role !== "system") return [{ role: "system", content: system }, ...turns];
  if (turns[0].content.trim() !== String(system).trim()) throw new Error("system and the system turn of the conversation differ");
  return turns;
}
