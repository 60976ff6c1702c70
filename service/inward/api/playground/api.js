// The service behind the page. A key is kept here, in memory, and nowhere else.

let key = "";
export const setKey = (value) => { key = value.trim(); };

function headers(type) {
  return { ...(type && { "content-type": type }), ...(key && { authorization: `Bearer ${key}` }) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `the server answered ${response.status}`);
  error.status = response.status;
  throw error;
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body) {
  const sent = { method: "POST", headers: headers("application/json"), body: JSON.stringify(body) };
  return (await checked(await fetch(path, sent))).json();
}

export async function upload(path, lines) {
  const sent = { method: "POST", headers: headers("application/x-ndjson"), body: lines };
  return (await checked(await fetch(path, sent))).json();
}

export async function text(path) {
  return (await checked(await fetch(path, { headers: headers() }))).text();
}

// Server-sent events as [name, JSON]; an event `error` is thrown.
export async function* events(path, body) {
  const sent = { method: "POST", headers: headers("application/json"), body: JSON.stringify(body) };
  const response = await checked(await fetch(path, sent));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (waiting + part.value).split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const name = /^event: (.*)$/m.exec(block)?.[1] ?? "";
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (data === undefined || data === "[DONE]") continue;
      const value = JSON.parse(data);
      if (value.error) throw new Error(value.error.message);
      yield [name, value];
    }
  }
}
