// node counter.js ADDRESS PORT: an HTTP server whose answers count up. Allocates and collects garbage all the while, and
// every fourth answer waits for a timer, every eighth for the thread pool.
"use strict";
const http = require("http");
const crypto = require("crypto");

let count = 0;
let kept = [];
setInterval(() => {
  kept.push({ text: "x".repeat(1000), number: count });
  if (kept.length > 2000) kept = [];
}, 1);
http
  .createServer((request, response) => {
    const number = ++count;
    if (number % 8 === 0) crypto.pbkdf2("a", "b", 10, 32, "sha256", () => response.end(String(number)));
    else if (number % 4 === 0) setTimeout(() => response.end(String(number)), 1);
    else response.end(String(number));
  })
  .listen(Number(process.argv[3]), process.argv[2]);
