// JSON lines {"template", "messages", "tools", "system"} on stdin -> JSON lines {"text"} or {"error"} on stdout.
//
// It answers one question: which prompt does Ollama (0.30 and later) build from a Modelfile's TEMPLATE? The rules are
// Ollama's (server/routes.go, template/template.go), the code is not: SYSTEM leads a chat that does not start with a
// system message; neighbours of one role become one message, joined by a blank line, except tool results; messages
// are structs, so that an unknown field is an error; any other name that is not known is a zero value.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
)

const messageBreak = "\n\n"

// message has the fields that a TEMPLATE may name in `range .Messages`.
type message struct {
	Role       string   `json:"role"`
	Content    string   `json:"content"`
	Thinking   string   `json:"thinking"`
	Images     []string `json:"images"`
	ToolCalls  []call   `json:"tool_calls"`
	ToolName   string   `json:"tool_name"`
	ToolCallID string   `json:"tool_call_id"`
}

type request struct {
	Template string    `json:"template"`
	System   string    `json:"system"`
	Messages []message `json:"messages"`
	Tools    tools     `json:"tools"`
}

type answer struct {
	Text  *string `json:"text,omitempty"`
	Error string  `json:"error,omitempty"`
}

var functions = template.FuncMap{
	"json":          asJSON,
	"currentDate":   func() string { return time.Now().Format(time.DateOnly) },
	"yesterdayDate": func() string { return time.Now().AddDate(0, 0, -1).Format(time.DateOnly) },
}

// withSystem puts the Modelfile's SYSTEM first, unless the chat brings its own system message there.
func withSystem(system string, chat []message) []message {
	if system == "" || (len(chat) > 0 && chat[0].Role == "system") {
		return chat
	}
	return append([]message{{Role: "system", Content: system}}, chat...)
}

// joinNeighbours merges neighbours of one role, and returns beside them the text of all system messages.
func joinNeighbours(chat []message) (string, []*message) {
	var systems []string
	var joined []*message
	for _, turn := range chat {
		turn := turn
		if turn.Role == "system" {
			systems = append(systems, turn.Content)
		}
		if last := len(joined) - 1; last >= 0 && turn.Role != "tool" && joined[last].Role == turn.Role {
			joined[last].Content += messageBreak + turn.Content
			continue
		}
		joined = append(joined, &turn)
	}
	return strings.Join(systems, messageBreak), joined
}

// readsMessages tells whether a node names .Messages; a template that never does is in Ollama's older, turn-by-turn form.
func readsMessages(node parse.Node) bool {
	return node != nil && strings.Contains(node.String(), ".Messages")
}

func render(asked request) (string, error) {
	compiled, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(asked.Template)
	if err != nil {
		return "", err
	}
	if compiled.Tree == nil || !readsMessages(compiled.Tree.Root) {
		return "", errors.New("the template does not range over .Messages")
	}
	for index := range asked.Messages {
		asked.Messages[index].Role = strings.ToLower(asked.Messages[index].Role)
	}
	system, messages := joinNeighbours(withSystem(asked.System, asked.Messages))
	var text strings.Builder
	err = compiled.Execute(&text, map[string]any{
		"System": system, "Messages": messages, "Tools": asked.Tools, "Response": "",
		"Think": false, "ThinkLevel": "", "IsThinkSet": false,
	})
	return text.String(), err
}

func serve(in io.Reader, out io.Writer) error {
	decoder := json.NewDecoder(in)
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	for {
		var asked request
		if err := decoder.Decode(&asked); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		given := answer{}
		if text, err := render(asked); err != nil {
			given.Error = err.Error()
		} else {
			given.Text = &text
		}
		if err := encoder.Encode(given); err != nil {
			return err
		}
	}
}

func main() {
	out := bufio.NewWriter(os.Stdout)
	err := serve(bufio.NewReader(os.Stdin), out)
	if flushed := out.Flush(); err == nil {
		err = flushed
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotemplate:", err)
		os.Exit(1)
	}
}
